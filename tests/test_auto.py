"""Auto classes know our models after `import subquad` alone, in either order of the imports."""

import subprocess
import sys

import pytest

from subquad import SubquadConfig, SubquadForCausalLM, registration

LOAD = (
    "import sys; from transformers import AutoConfig, AutoModelForCausalLM; folder = sys.argv[1]; "
    "assert 'subquad.models' not in sys.modules; "
    "assert type(AutoConfig.from_pretrained(folder)).__name__ == 'SubquadConfig'; "
    "print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "gla"
    config = SubquadConfig(mixer="gla", hidden_size=16, num_hidden_layers=1)
    SubquadForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "first",
    [  # in the first, our models could not be imported while transformers is importing its own
        "import subquad; from transformers import PreTrainedModel",
        "import transformers.models.auto.configuration_auto, subquad",
    ],
)
def test_importing_subquad_is_enough(folder, first):
    done = subprocess.run(
        [sys.executable, "-c", f"{first}; {LOAD}", str(folder)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "SubquadForCausalLM", done.stderr


def test_a_table_that_has_changed_is_left_alone():
    import types

    registration.promise(types.ModuleType("configuration_auto"))
    table = types.ModuleType("configuration_auto")
    table.CONFIG_MAPPING = {}
    registration.promise(table)
    assert table.CONFIG_MAPPING == {}
