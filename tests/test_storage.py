import json
import sys
from pathlib import Path

import pytest
import torch

from sculpt_ops.files import replacing
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, Shapes


@pytest.mark.parametrize("sides", ["both", "left", "right", "block"])
def test_save_and_load(tmp_path: Path, sides: str) -> None:
    model = Shapes()
    saved = Subspaces.from_model(model, 0.75, sides=sides, targets=list(SHAPES))  # type: ignore[arg-type]
    path = tmp_path / "subspaces.safetensors"
    saved.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with torch.no_grad():
        model.square.add_(torch.randn(32, 32))
    loaded = Subspaces.load(path, model)
    assert loaded.summary() == saved.summary()
    assert loaded.leak() == saved.leak()
    for name, layer in saved.items():
        for side in ("left", "right"):
            old, new = getattr(layer, side), getattr(loaded[name], side)
            assert (old is None and new is None) or torch.equal(old, new)
        assert repr(loaded[name]) == repr(layer)
    assert Subspaces.load(path).parameter("square") is None


def test_importance_is_saved(tmp_path: Path) -> None:
    subspaces = Subspaces.from_model(Shapes(), targets=list(SHAPES))
    assert subspaces.importance == {}
    subspaces.importance = {"square": 1.25, "wide": 0.75, "tall": -0.5}
    subspaces.save(tmp_path / "bases.safetensors")
    loaded = Subspaces.load(tmp_path / "bases.safetensors")
    assert loaded.importance == subspaces.importance
    assert loaded.summary() == subspaces.summary()
    assert [line.split()[-1] for line in loaded.summary().splitlines()[:4]] == ["importance", "1.25", "0.75", "-0.50"]


def test_load_refuses_other_files(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "subspaces.safetensors"
    Subspaces.from_model(Shapes(), targets="square").save(path)
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"subspaces\.safetensors is truncated or not a safetensors file"):
            Subspaces.load(path)
    save_file({"square:left": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"was not written by Subspaces\.save"):
        Subspaces.load(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors | {"square:left": torch.zeros(32, 15)}, path, metadata)
    with pytest.raises(ValueError, match=r"the left basis of square has shape \(32, 15\), wanted \(32, 16\)"):
        Subspaces.load(path)
    save_file(tensors | {"square:sketch": torch.zeros(32, 16, dtype=torch.float64)}, path, metadata)
    with pytest.raises(ValueError, match=r"the sketch of square has shape \(32, 16\), wanted \(96, 16\)"):
        Subspaces.load(path)
    ((key, header),) = metadata.items()
    for content in (json.dumps(json.loads(header) | {"layers": {"square": {}}}), header.replace("unprotected", "x")):
        save_file(tensors, path, {key: content})
        with pytest.raises(ValueError, match=r"subspaces\.safetensors: its header is not one of subspaces"):
            Subspaces.load(path)
    with pytest.raises(FileNotFoundError):
        Subspaces.load(tmp_path / "absent.safetensors")


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    path = tmp_path / "subspaces.safetensors"
    path.write_bytes(b"old")

    def fail(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Subspaces.from_model(Shapes(), targets="square").save(path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_without_safetensors_one_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subspaces = Subspaces.from_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), targets="*.weight")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"saving subspaces needs safetensors: pip install 'sculpt-ops\[train\]'"):
        subspaces.save(tmp_path / "bases.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_replacing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("old", 1)
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("new", 1)
