"""Rooms: no two files import each other in a circle, and no room is overfull."""

from collections import Counter
from pathlib import Path

import grimp
import networkx
import pytest

import subquad

ROOT = Path(subquad.__file__).parent
MOST = 16  # files in a room, __init__ among them; mixers has one a row


def test_no_files_import_each_other_in_a_circle():
    imports = grimp.build_graph("subquad", exclude_type_checking_imports=False)
    graph = networkx.DiGraph()
    for module in imports.modules:
        for other in imports.find_modules_directly_imported_by(module):
            graph.add_edge(module, other)
    circles = [c for c in networkx.strongly_connected_components(graph) if len(c) > 1]
    assert circles == []


def test_rooms_are_not_overfull():
    rooms = Counter(path.parent for path in ROOT.rglob("*.py"))
    full = {str(room.relative_to(ROOT)): n for room, n in rooms.items() if n > MOST}
    assert set(full) <= {"mixers", "ssm"}, full


@pytest.mark.parametrize("room", ["engines", "backend", "decode", "layers", "table", "models"])
def test_every_room_says_what_it_is_for(room):
    for path in (ROOT / room).rglob("__init__.py"):
        assert path.read_text().startswith('"""'), path
