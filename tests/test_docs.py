"""The documentation is true: every Python block of every page runs, and its tables are current.

Blocks fenced as ```python run from top to bottom in one namespace a page, with the page's own line
numbers in tracebacks. (```py is for code that is only shown.) A table between

    <!-- table: NAME -->        and        <!-- end of table -->

is made from the code by the function TABLES[NAME]. `python tests/test_docs.py` writes them anew.
"""

import ast
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType

import pytest
import torch

from subquad.arena.scaling.report import exponent_text
from subquad.arena.scaling.results import QUANTITIES, Exponent
from subquad.mixers import MIXERS
from subquad.table import ROWS, Row
from subquad.tasks import TASKS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
INLINE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)")
TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end of table -->)", re.S)


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
def _leave_no_rows_behind() -> Iterator[None]:
    """Pages may register mixers of their own; other tests must not meet them."""
    before = dict(MIXERS), dict(ROWS)
    yield
    for registry, entries in zip((MIXERS, ROWS), before):
        registry.clear()
        registry.update(entries)


ALL_PAGES = [README, *sorted(DOCS.glob("*.md"))]
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
    assert {"add-a-row", "annotated-recurrence", "state-spaces"} <= {page.stem for page in PAGES}


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
            what = (f"`{name}`", row.engine, _decay(row), _erase(row), short, long, row.paper)
            lines.append(f"| {' | '.join(what)} |")
    return "\n".join(lines) + "\n"


def rows_to_come() -> str:
    """The published rows that the table lists and no mixer computes yet."""
    idle = [f"`{name}`" for name in ROWS if name not in MIXERS]
    return (", ".join(idle) + "." if idle else "None: every row runs.") + "\n"


def readme_rows() -> str:
    """The formulas of the rows that run."""
    lines = ["| Row | Keeps and writes | Reads | State | Paper |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        if name in MIXERS:
            # A bar in a formula would end the table's cell.
            write, read = (formula.replace("|", "\\|") for formula in (row.write, row.read))
            lines.append(f"| `{name}` | {write} | {read} | {row.state} | {row.paper} |")
    return "\n".join(lines) + "\n"


def tree() -> str:
    """Every module with the first sentence of its docstring."""
    package = ROOT / "src" / "subquad"
    lines = ["```", "src/subquad/"]
    for folder in (package, *sorted(path.parent for path in package.glob("*/__init__.py"))):
        files = {file.name: _first_sentence(file) for file in sorted(folder.glob("*.py"))}
        about, indent = files.pop("__init__.py"), "  "
        if folder != package:
            lines.append(f"  {folder.name + '/':<28} {about}")
            indent = "    "
        lines += [f"{indent}{name:<{30 - len(indent)}} {text}" for name, text in files.items()]
    return "\n".join([*lines, "```"]) + "\n"


def _first_sentence(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text("utf-8")))
    assert text, f"{module} says nowhere what it is for"
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`])\. ", paragraph)[0].rstrip(".")


def cpu_results() -> str:
    """What benchmarks/cpu.py last measured."""
    return (DOCS / "results" / "cpu.md").read_text(encoding="utf-8")


def task_rows() -> str:
    """What each task measures, who solves it, where it is from."""
    lines = ["| Task | Measures | Solved by | From |", "|---|---|---|---|"]
    for name, cls in TASKS.items():
        lines.append(f"| `{name}` | {cls.measures} | {cls.solved_by} | {cls.source} |")
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
        claim = f"{ROWS[row['row']].train}, {ROWS[row['row']].decode}"
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
    "tree": tree,
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
    return TABLE.sub(lambda found: f"{found[1]}{found[2]}\n{TABLES[found[1]]()}\n", text)


def pages_with_tables() -> list[Path]:
    return [page for page in ALL_PAGES if TABLE.search(page.read_text("utf-8"))]


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
