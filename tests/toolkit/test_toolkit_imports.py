"""Importing EasyEdit: where it comes from, what is left out, and what others get to see of that."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from coachhook_plugin.toolkit import imports

pytestmark = pytest.mark.once

FILES = {
    "__init__.py": "import random\nrandom.seed(42)\nfrom .text import *\nfrom . import trainer\n",
    "text.py": (
        "import importlib.util\nimport absentpackage\nimport absentpackage.deep as deep\n"
        "from absentpackage.inner import Tool, helper\n\n"
        "fooled = importlib.util.find_spec('absentpackage') is not None\n\n\n"
        "class Mine(Tool):\n    pass\n\n\n"
        "def annotated(x: absentpackage.Choice[int]) -> None:\n    pass\n\n\n"
        "def late():\n    import absentpackage\n"
    ),
    "trainer/__init__.py": "from .pictures import *\nfrom .pictures import Lens\n",
    "trainer/pictures.py": "import absentpictures\n\n\nclass Lens(absentpictures.Base):\n    pass\n",
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A toolkit in a folder, that needs two packages nobody has."""
    home = tmp_path / "home"
    for name, text in FILES.items():
        path = home / "toytoolkit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(imports, "TOOLKIT", "toytoolkit")
    monkeypatch.setattr(imports, "PARTS", ("toytoolkit.trainer.pictures",))
    monkeypatch.setattr(imports, "PACKAGES", {"absentpackage": "absent-package"})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, imports.ToolkitFinder)])
    monkeypatch.setenv("EASYEDIT_HOME", str(home))
    yield home
    for name in [name for name in sys.modules if name.partition(".")[0] in ("toytoolkit", "absentpackage")]:
        del sys.modules[name]


def _import(after: Callable[[ModuleType], None] = lambda module: None) -> ModuleType:
    imports.watch(after)
    return importlib.import_module("toytoolkit")


def test_the_method_joins_right_after_a_later_import_and_once(toy: Path) -> None:
    joined: list[ModuleType] = []
    imports.watch(joined.append)
    imports.watch(joined.append)
    assert joined == []
    module = importlib.import_module("toytoolkit")
    assert joined == [module]
    assert Path(str(module.__file__)).is_relative_to(toy)
    imports.watch(joined.append)
    assert joined == [module, module]


def test_a_wrong_easyedit_home_is_said_plainly(toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    with pytest.raises(ImportError, match="EASYEDIT_HOME"):
        _import()


def test_missing_packages_are_named_when_used_not_when_imported(toy: Path) -> None:
    toolkit = _import()
    text = toolkit.text
    for use in (text.Tool, text.Tool.make, text.helper, text.absentpackage.any, text.deep.any, text.Mine):
        with pytest.raises(ImportError, match=r"toytoolkit\.text needs .*'absentpackage'.*absent-package"):
            use()
    with pytest.raises(ImportError, match=r"pictures.*absentpictures"):
        toolkit.trainer.Lens()
    assert not isinstance(object(), text.Tool)
    with pytest.raises(ModuleNotFoundError):
        text.late()


def test_nobody_is_told_that_a_missing_package_is_there(toy: Path) -> None:
    toolkit = _import()
    assert not toolkit.text.fooled
    assert not [name for name in sys.modules if name.startswith("absent")]
    assert importlib.util.find_spec("absentpackage") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absentpackage")


def test_what_is_installed_is_never_replaced(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "absentpackage/__init__.py": "class Choice:\n    __class_getitem__ = classmethod(lambda cls, item: cls)\n",
        "absentpackage/deep.py": "",
        "absentpackage/inner.py": "class Tool:\n    pass\n\n\ndef helper():\n    return 'real'\n",
        "absentpictures.py": "class Base:\n    pass\n",
    }.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    toolkit = _import()
    assert toolkit.text.helper() == "real"
    assert all((toolkit.text.Tool(), toolkit.text.Mine(), toolkit.trainer.Lens()))


def test_a_toolkit_that_is_broken_otherwise_says_so(toy: Path) -> None:
    (toy / "toytoolkit" / "text.py").write_text("import neverheardof\n")
    with pytest.raises(ModuleNotFoundError, match="neverheardof"):
        _import()


def test_python_imports_and_random_numbers_are_as_before(toy: Path) -> None:
    ordinary, finders = builtins.__import__, len(sys.meta_path)
    random.seed(7)
    expected = random.getstate()
    _import()
    assert random.getstate() == expected
    assert builtins.__import__ is ordinary
    assert len(sys.meta_path) == finders + 1


def test_importing_the_plugin_does_not_import_easyedit() -> None:
    program = "import coachhook_plugin.toolkit as t, sys; t.register(); print('easyeditor' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True)
    assert (done.stdout.strip(), done.stderr.strip()) == ("False", "")
