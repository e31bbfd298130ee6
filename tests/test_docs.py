"""The documentation is true: every Python block of every page runs, and its tables are current.

Blocks fenced as ```python run from top to bottom in one namespace a page, with the page's own line
numbers in tracebacks, in an empty folder. (```py is for code that is only shown.) A table between

    <!-- table: NAME -->        and        <!-- end of table -->

is made from the code by the function TABLES[NAME]. `python tests/test_docs.py` writes them anew,
and with them how many rows there are, wherever a page says it.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType

import pytest
import torch
import yaml

import subquad
from subquad.arena.scaling.report import exponent_text
from subquad.arena.scaling.results import QUANTITIES, Exponent
from subquad.mixers import MIXERS
from subquad.table import ROWS, Recurrence, Row
from subquad.tasks import TASKS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
INLINE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)")
TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end of table -->)", re.S)
COUNT = re.compile(r"\b\d+(?= rows run\b| of the \d+ rows run\b)")
LISTED = re.compile(r"(?<=rows run today, )\d+(?= are listed)|(?<=\d of the )\d+(?= rows run)")
ARXIV = re.compile(r"(?<!\[)(?<!\babs/)arXiv:\d{4}\.\d{4,5}")
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$`\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\d$])", re.S)


def blocks(page: Path) -> Iterator[CodeType]:
    """The page's Python, each block compiled as the lines of the page that it is."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, block.start(1))
        yield compile("\n" * lines_before + block[1], str(page), "exec")


def run(page: Path) -> None:
    namespace = {"__name__": f"docs.{page.stem.replace('-', '_')}"}
    for block in blocks(page):
        exec(block, namespace)


@pytest.fixture(autouse=True)
def _leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages may register mixers of their own and write files; other tests must not meet them."""
    monkeypatch.chdir(tmp_path)
    before = dict(MIXERS), dict(ROWS)
    yield
    for registry, entries in zip((MIXERS, ROWS), before):
        registry.clear()
        registry.update(entries)


ALL_PAGES = [README, CONTRIBUTING, *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("reference/*.md"))]
PAGES = [page for page in ALL_PAGES if BLOCK.search(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page: Path) -> None:
    run(page)


def test_links_between_pages_lead_somewhere() -> None:
    pages = {
        str(page.relative_to(ROOT)): FENCED.sub("", page.read_text("utf-8")) for page in ALL_PAGES
    }
    links = [
        (name, target, anchor)
        for name, text in pages.items()
        for target, anchor in LINK.findall(INLINE.sub("", text))
    ]
    assert links
    for name, target, anchor in links:
        place = ROOT / name if not target else (ROOT / name).parent / target
        assert place.exists(), f"{name} links to {target}, which is no file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", pages[str(place.relative_to(ROOT))], re.M)
            assert anchor in map(slug, headings), f"{name} links to {target}#{anchor}"


def slug(heading: str) -> str:
    """The anchor of a heading, as mkdocs and GitHub make it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_the_pages_that_promise_to_run_do_have_code() -> None:
    promised = {"README", "quickstart", "choose", "add-a-row", "annotated-recurrence"}
    promised |= {"why-selection", "state-spaces", "tasks"}
    assert promised <= {page.stem for page in PAGES}


def test_arxiv_ids_are_links() -> None:
    for page in ALL_PAGES:
        prose = INLINE.sub("", FENCED.sub("", page.read_text("utf-8")))
        assert not ARXIV.findall(prose), f"{page.name}: [arXiv:ID](https://arxiv.org/abs/ID)"


def test_the_site_links_arxiv_ids_in_docstrings_too() -> None:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    link = '<a href="https://arxiv.org/abs/2405.21060">arXiv:2405.21060</a>'
    assert hooks.on_page_content("<p>(arXiv:2405.21060)</p>") == f"<p>({link})</p>"
    for kept in (link, "<pre><code>arXiv:2405.21060</code></pre>"):
        assert hooks.on_page_content(kept) == kept


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == subquad.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def formulas(page: Path) -> list[str]:
    prose = INLINE.sub("", FENCED.sub("", page.read_text("utf-8")))
    return [display or inline for display, inline in FORMULA.findall(prose)]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run KaTeX")
def test_formulas_can_be_set() -> None:
    found = {formula: page.name for page in ALL_PAGES for formula in formulas(page)}
    assert len(found) > 100
    script = """
        const katex = require(process.argv[1]), read = require("fs").readFileSync(0, "utf8");
        for (const [formula, page] of Object.entries(JSON.parse(read)))
            try { katex.renderToString(formula, {throwOnError: true, strict: "error"}); }
            catch (error) { console.log(page + ": " + formula + ": " + error.message); }
    """
    command = ["node", "-e", script, str(DOCS / "assets" / "katex" / "katex.min.js")]
    run = subprocess.run(
        command, input=json.dumps(found), text=True, encoding="utf-8", capture_output=True
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


def test_every_public_name_is_in_the_reference() -> None:
    described = set()
    for page in DOCS.glob("reference/*.md"):
        for place in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M):
            module, _, name = place.rpartition(".")
            described.add(id(getattr(importlib.import_module(module), name)))
    rooms = ("", ".mixers", ".models", ".ssm", ".tasks", ".train", ".generate", ".arena")
    for room in (importlib.import_module(f"subquad{room}") for room in rooms):
        for name in room.__all__:
            thing = getattr(room, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert id(thing) in described, f"{room.__name__}.{name} is in no reference page"


def test_a_false_claim_fails_at_its_own_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\nSo:\n\n```python\n\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        run(page)
    frame = traceback.extract_tb(failure.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno) == (str(page), 11)
    assert frame.line == "assert x == 2"


# ---- tables made from the code


HIDDEN, SHORT, LONG = 256, 128, 4096


def rows_that_run() -> str:
    """What each row that runs forgets, erases and keeps. Bytes are counted on real states."""
    lines = [
        f"| Row | Engine | Decay | Erase | Kept after {SHORT} tokens | after {LONG:,} | Paper |",
        "|---|---|---|---|--:|--:|---|",
    ]
    for name, row in ROWS.items():
        if name in MIXERS:
            short, long = (_kib(_state_bytes(name, tokens)) for tokens in (SHORT, LONG))
            what = (f"`{name}`", row.engine, _decay(row), _erase(row), short, long, paper(row))
            lines.append(f"| {' | '.join(what)} |")
    return "\n".join(lines) + "\n"


def rows_to_come() -> str:
    """The published rows that the table lists and no mixer computes yet."""
    idle = [f"`{name}`" for name in ROWS if name not in MIXERS]
    return (", ".join(idle) + "." if idle else "None: every row runs.") + "\n"


def runs_in_plain_pytorch(kind: Recurrence, device: str) -> bool:
    """Whether whole sequences of this kind have no compiled code of ours on the device."""
    along_values = kind.decay in ("fixed_value", "token_value", "token_key_value")
    erases = {"cpu": kind.erase == "low_rank", "gpu": kind.erase != "none"}[device]
    return kind.engine in ("invariant", "nonlinear") or along_values or erases


def readme_rows() -> str:
    """The rows that run, and by what; those to come in one line."""
    lines = [
        "| Row | Keeps and writes | CPU | GPU | Streams | Paper |",
        "|---|---|:-:|:-:|:-:|---|",
    ]
    for name, row in ROWS.items():
        if name in MIXERS:
            ticks = [
                "○" if any(runs_in_plain_pytorch(kind, device) for kind in row.recurrences) else "✓"
                for device in ("cpu", "gpu")
            ]
            write = row.write.replace("|", "\\|")
            streams = "grows" if row.state_grows else "✓"
            lines.append(f"| {' | '.join((f'`{name}`', write, *ticks, streams, paper(row)))} |")
    coming = [f"`{name}`" for name in ROWS if name not in MIXERS]
    if coming:
        lines.append(f"| *{len(coming)} to come* | {', '.join(coming)} | | | | |")
    return "\n".join(lines) + "\n"


def paper(row: Row) -> str:
    return re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", row.paper)


def all_rows() -> str:
    """Everything the table knows of every row, formulas as LaTeX."""
    heads = (
        "Row",
        "Runs",
        "Keeps and writes",
        "Reads",
        "State",
        "Train",
        "Decode",
        "Notes",
        "Paper",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|:-:|" + "---|" * (len(heads) - 2)]
    for name, row in ROWS.items():
        runs = "✓" if name in MIXERS else "to come"
        maths = map(latex, (row.write, row.read, row.state, row.train, row.decode, row.features))
        lines.append(f"| {' | '.join((f'`{name}`', runs, *maths, paper(row)))} |")
    return "\n".join(lines) + "\n"


SYMBOLS = {
    "\u1e7c": r"\tilde{V}", "\u1e8c": r"\ddot{X}", "K\u0303": r"\tilde{K}", "B\u0304": r"\bar{B}",
    "\u0100": r"\bar{A}", "\u1d40": r"^\top", "\u2299": r"\odot", "·": r"\cdot", "\u2217": "*",
    "Σ": r"\sum", "≤": r"\le", "≥": r"\ge", "²": "^2", "₀": "_0", "₁": "_1", "₂": "_2",
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "η": r"\eta", "κ": r"\kappa", "σ": r"\sigma",
    "φ": r"\phi", "Δ": r"\Delta", "|": r"\vert",
}  # fmt: skip
OPERATORS = "exp|max|tanh|log|sin|cos"
FUNCTIONS = "diag|softmax|silu|elu|relu|conv|logsigmoid|Re|SSM"
PIECE = re.compile(
    rf"(?P<index>_\{{[^}}]*\}}|_[A-Za-z0-9]+)|(?P<root>√\w)"
    r"|(?P<keys>\bHk\b)|(?P<product>(?<! )·(?! ))"
    rf"|\b(?P<operator>{OPERATORS})(?![a-z])|\b(?P<function>{FUNCTIONS})(?![a-z])"
    rf"|(?P<words>'s\b|HiPPO|[A-Za-z0-9-]*[a-z]{{2,}}[\w-]*|\ba\b(?= [a-z]))|(?P<gap>,\s\s+)"
    rf"|(?P<symbol>{'|'.join(map(re.escape, SYMBOLS))})"
)


def latex(formula: str) -> str:
    """A formula of the table, as LaTeX between dollars; the words between stay words."""
    if not formula:
        return ""
    text = re.sub(r"\$\s*\$", " ", f"${PIECE.sub(_piece, formula)}$")
    text = re.sub(r"\$\s*([^$]*?)\s*\$", r"$\1$", text)
    text = re.sub(r"\s*\$([,;:])\s*", r"\1 $", text)  # punctuation after a word is the sentence's
    text = re.sub(r"\s*([,;:])\$(?=\s)", r"$\1", text)
    return re.sub(r"\s+", " ", text.replace("$$", "")).strip()


def _piece(found: re.Match[str]) -> str:
    text = found[0]
    match found.lastgroup:
        case "index":
            inner = text[1:].strip("{}")
            if inner.isalpha() and len(inner) > 2:
                return rf"_{{\mathrm{{{inner}}}}}"
            inner = inner if inner.isalpha() else PIECE.sub(_piece, inner)
            return f"_{inner}" if len(inner) == 1 else f"_{{{inner}}}"
        case "root":
            return rf"\sqrt{{{text[1:]}}}"
        case "keys":
            return "H_k"
        case "product":
            return r"\,"
        case "operator":
            return rf"\{text}"
        case "function":
            return rf"\mathrm{{{text}}}"
        case "words":
            return f"${text} $" if text == "'s" else f"$ {text} $"
        case "gap":
            return r",\quad "
    return SYMBOLS[text] + (" " if SYMBOLS[text][-1].isalpha() else "")


def tree() -> str:
    """Every module with the first sentence of its docstring."""
    package = ROOT / "src" / "subquad"
    return "\n".join(["```", "src/subquad/", *_folder(package, "  "), "```"]) + "\n"


def _folder(folder: Path, indent: str) -> Iterator[str]:
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        inside = path / "__init__.py"
        if path.is_dir() and inside.exists():
            yield f"{indent + path.name + '/':<32} {_first_sentence(inside)}"
            yield from _folder(path, indent + "  ")
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield f"{indent + path.name:<32} {_first_sentence(path)}"


def _first_sentence(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text("utf-8")))
    assert text, f"{module} says nowhere what it is for"
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`])(?<!\bal)\. ", paragraph)[0].rstrip(".")


def demo() -> str:
    """What the demo last found."""
    report = json.loads((DOCS / "results" / "demo.json").read_text("utf-8"))
    lines = [
        "| row | held-out bits/byte | train, tokens/s | decode, tokens/s at 128 / 2k / 16k "
        "| cache at 128 / 2k / 16k |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in report["summary"]:
        speeds = " / ".join(f"{x:,.0f}" for x in row["decode_tokens_per_second"].values())
        sizes = list(dict.fromkeys(_kib(x) for x in row["cache_bytes"].values()))
        cells = (
            row["row"], f"{row['heldout_bits_per_byte']:.3f}",
            f"{row['train_tokens_per_second']:,.0f}", speeds, " / ".join(sizes),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cpu_results() -> str:
    """What benchmarks/cpu.py last measured."""
    return (DOCS / "results" / "cpu.md").read_text(encoding="utf-8")


def task_rows() -> str:
    """What each task measures, who solves it, where it is from."""
    lines = ["| Task | Measures | Solved by | From |", "|---|---|---|---|"]
    for name, cls in TASKS.items():
        source = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", cls.source)
        lines.append(f"| `{name}` | {cls.measures} | {cls.solved_by} | {source} |")
    return "\n".join(lines) + "\n"


def evidence() -> str:
    """Every claim that benchmarks/evidence.py has judged, and its judgement."""
    lines = ["| Experiment | Size | Claim | Ours |", "|---|---|---|---|"]
    said = {True: "holds", False: "does not hold", None: "not judged: rows are missing"}
    for file in sorted((DOCS / "results" / "evidence").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        page = f"[{record['experiment']}](results/evidence/{file.stem}.md)"
        for judged in record["verdict"]:
            cells = (page, record["size"], judged["claim"], said[judged["holds"]])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scaling(machine: str) -> str:
    """The exponents that `subquad arena --scaling` last measured on a machine."""
    record = json.loads((DOCS / "results" / f"scaling-{machine}.json").read_text(encoding="utf-8"))
    heads = ("train time", "train bytes", "decode time", "state bytes")
    columns = [f"{head}, {variable}" for variable in ("T", "d") for head in heads]
    lines = [
        f"| Row | Claimed: train, a token | {' | '.join(columns)} |",
        f"|---|---|{'--:|' * len(columns)}",
    ]
    for row in record["rows"]:
        fits = [row["exponents"][v][q] for v in ("T", "d") for q in QUANTITIES]
        fits = [Exponent(fit["value"], fit["error"], 0, 0) for fit in fits]
        claim = f"{latex(ROWS[row['row']].train)}, {latex(ROWS[row['row']].decode)}"
        cells = (f"`{row['row']}`", claim, *map(exponent_text, fits))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gpu_layers() -> str:
    rows = json.loads((DOCS / "results" / "layers-h200.json").read_text("utf-8"))["rows"]
    lines = ["| work | | floor | ours (of floor) | fla | | PyTorch | |", "|" + "---|" * 8]
    for row in rows:
        best = min(row[who]["graph_ms"] for who in ("ours", "ours in place") if who in row)
        cells = [row["work"], row["kind"], f"{row['floor_ms']:.4f}"]
        cells.append(f"{best:.4f} ({row['floor_ms'] / best:.0%})")
        for peers in (("fla",), ("torch", "torch conv1d", "torch shifts")):
            times = [row[peer]["graph_ms"] for peer in peers if peer in row]
            found = [f"{min(times):.4f}", f"{min(times) / best:.2f}x"] if times else ["", ""]
            cells += found
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


GATES = {"none": "none", "fixed": "fixed", "head": "per head", "key": "per key channel"}


def _of_floor(row: dict) -> list[str]:
    """Forward, and forward + backward, and the memory of both."""
    ours = row["ours"]
    times = [ours.get(f"{x}_graph_ms") or ours[f"{x}_kernels_ms"] for x in ("forward", "both")]
    return [
        *(f"{ms:.3f} ({floor / ms:.0%})" for ms, floor in zip(times, row["floor_ms"])),
        f"{ours['peak_MiB']:.0f}" if "peak_MiB" in ours else "",
    ]


def gpu_peers() -> str:
    """The scan on an H200 against the best of the peers, each way of its own."""
    report = json.loads((DOCS / "results" / "gpu-h200-peers.json").read_text("utf-8"))
    lines = [
        "| shape | decay | forward, ms (of floor) | both, ms (of floor) | both, MiB "
        "| best peer, ms | times as fast | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        found = [
            (peer, *(row[peer][f"{way}_graph_ms"] for way in ("forward", "both")))
            for peer in ("fla", "fla_expanded", "mamba_ssm")
            if peer in row
        ]
        best = [min(found, key=lambda one: one[way]) for way in (1, 2)]
        names = [one[0] for one in best]
        times = [one[way] for one, way in zip(best, (1, 2))]
        ours = [row["ours"][f"{way}_graph_ms"] for way in ("forward", "both")]
        cells = [
            row["shape"],
            GATES[row["gate"]],
            *_of_floor(row),
            ", ".join(f"{ms:.3f}" for ms in times) + f" ({', '.join(dict.fromkeys(names))})",
            ", ".join(f"{theirs / ms:.2f}x" for theirs, ms in zip(times, ours)),
            f"{row['ours']['peak_MiB'] / row['fla']['peak_MiB']:.2f} of fla's",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_scan() -> str:
    """The scan on an H100, where no peer ran."""
    report = json.loads((DOCS / "results" / "gpu-h100.json").read_text("utf-8"))
    lines = [
        "| shape | decay | forward, ms (of floor) | both, ms (of floor) | both, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(f"| {' | '.join([row['shape'], GATES[row['gate']], *_of_floor(row)])} |")
    return "\n".join(lines)


def gpu_packed() -> str:
    """Forward + backward of packed sequences and, in a batch, of as many equal ones."""
    report = json.loads((DOCS / "results" / "gpu-h200-packed.json").read_text("utf-8"))
    found = {(row["sequences"], row["gate"]): row for row in report["rows"]}
    gates = list(dict.fromkeys(gate for _, gate in found))
    heads = GATES | {"none": "no decay"}
    lines = [
        "| sequences | " + " | ".join(f"{heads[gate]}: packed, equal" for gate in gates) + " |",
        "|---|" + "---|" * len(gates),
    ]
    for sequences in dict.fromkeys(sequences for sequences, _ in found):
        rows = [found[sequences, gate] for gate in gates]
        cells = [f"{row['ours']['both_ms']:.2f}, {row['equal']['both_ms']:.2f}" for row in rows]
        lines.append(f"| {sequences:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_crossing() -> str:
    """Forward and forward + backward against causal softmax attention, by length."""
    report = json.loads((DOCS / "results" / "gpu-h100.json").read_text("utf-8"))
    ways = {"none": "no decay", "head": "per head", "key": "per key channel", "sdpa": "attention"}
    lines = ["| tokens a sequence | " + " | ".join(ways.values()) + " |", "|---|" + "---|" * 4]
    for row in report["crossing"]:
        cells = [
            f"{row[way]['forward_graph_ms']:.2f}, {row[way]['both_graph_ms']:.2f}" for way in ways
        ]
        lines.append(f"| {row['tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_training(name: str) -> str:
    rows = json.loads((DOCS / "results" / name).read_text("utf-8"))["rows"]
    lines = [
        "| model | by | parameters | training, tokens/s | ms a step | of matmul peak | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['by']} | | {row['error'].split(':')[0]} | | | |")
            continue
        lines.append(
            f"| {row['model']} | {row['by']} | {row['parameters'] / 1e6:.0f}M | "
            f"{row['tokens_per_s'] / 1e3:.1f}k | {row['ms']:.0f} | "
            f"{row['share_of_matmul_peak']:.1%} | {row['peak_GiB']:.0f} GiB |"
        )
    return "\n".join(lines)


def gpu_elementwise() -> str:
    """Losses and gates beside PyTorch's."""
    report = json.loads((DOCS / "results" / "elementwise-h200.json").read_text("utf-8"))
    fla = {(row["work"], row["kind"]): row["graph_ms"] for row in report["fla"]["rows"]}
    lines = [
        "| work | | floor | ours (of floor) | fla | PyTorch | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ours, torchs = row["ours"]["graph_ms"], row["torch"]["graph_ms"]
        theirs = fla.get((row["work"], row["kind"]))
        cells = [
            row["work"], row["kind"], f"{row['floor_ms']:.3f}",
            f"{ours:.3f} ({row['floor_ms'] / ours:.0%})", "" if theirs is None else f"{theirs:.3f}",
            f"{torchs:.3f}", f"{torchs / ours:.1f}x",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_models() -> str:
    rows = json.loads((DOCS / "results" / "models-h200.json").read_text("utf-8"))["rows"]
    lines = []
    made = [row for row in rows if row["work"] == "generate"]
    batches = sorted({row["batch"] for row in made})
    heads = [f"batch {batch}: prefill, ms a token, new tokens/s" for batch in batches]
    lines += ["| model | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in made):
        cells = [f"{model}, `{way}`"]
        for row in made:
            if (row["model"], row["way"]) == (model, way):
                cells.append(
                    f"{row['prefill_ms']:.0f} ms, {row['ms_per_token']:.2f}, "
                    f"{row['tokens_per_s']:.0f}"
                )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "rows_that_run": rows_that_run,
    "rows_to_come": rows_to_come,
    "readme_rows": readme_rows,
    "all_rows": all_rows,
    "tree": tree,
    "demo": demo,
    "cpu_results": cpu_results,
    "tasks": task_rows,
    "evidence": evidence,
    "scaling": partial(scaling, "cpu"),
    "scaling_gpu": partial(scaling, "h200"),
    "gpu_peers": gpu_peers,
    "gpu_scan": gpu_scan,
    "gpu_crossing": gpu_crossing,
    "gpu_packed": gpu_packed,
    "gpu_layers": gpu_layers,
    "gpu_training": partial(gpu_training, "models-train-h200-fused.json"),
    "gpu_training_earlier": partial(gpu_training, "models-train-h200.json"),
    "gpu_elementwise": gpu_elementwise,
    "gpu_models": gpu_models,
}


def _decay(row: Row) -> str:
    if row.engine == "attention":
        return "-"
    return {
        "none": "none",
        "fixed_head": "fixed, a head",
        "fixed_key": "fixed, a key channel",
        "fixed_element": "fixed, an element",
        "token_head": "by token, a head",
        "token_key": "by token, a key channel",
        "fixed_value": "fixed, a value channel",
        "token_value": "by token, a value channel",
        "token_key_value": "by token, key and value channel",
        "token_element": "by token, an element",
    }[row.recurrence.decay]


def _erase(row: Row) -> str:
    return {"none": "-", "delta": "delta rule", "low_rank": "rank one"}[row.recurrence.erase]


@torch.no_grad()
def _state_bytes(name: str, tokens: int) -> int:
    """Of one layer with its default options, after one sequence."""
    _, state = MIXERS[name](HIDDEN)(torch.zeros(1, tokens, HIDDEN))
    return sum(tensor.nbytes for tensor in state.values())


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f} KiB"


def with_current_tables(text: str) -> str:
    text = COUNT.sub(str(len([name for name in ROWS if name in MIXERS])), text)
    text = LISTED.sub(str(len(ROWS)), text)
    return TABLE.sub(lambda found: f"{found[1]}{found[2]}\n{TABLES[found[1]]()}\n", text)


def pages_with_tables() -> list[Path]:
    made = (TABLE, COUNT, LISTED)
    return [page for page in ALL_PAGES if any(x.search(page.read_text("utf-8")) for x in made)]


def test_the_readme_is_short_and_says_how_many_rows_run() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert COUNT.search(text) and LISTED.search(text)


def test_tables_are_current() -> None:
    found = set()
    for page in pages_with_tables():
        text = page.read_text(encoding="utf-8")
        found |= {table[1] for table in TABLE.finditer(text)}
        assert with_current_tables(text) == text, (
            f"a table of {page.name} is out of date; `python {Path(__file__).name}` in tests/ "
            "writes it anew"
        )
    assert found == set(TABLES)


def main() -> None:
    for page in pages_with_tables():
        page.write_text(with_current_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the tables of {page}", file=sys.stderr)


if __name__ == "__main__":
    main()
