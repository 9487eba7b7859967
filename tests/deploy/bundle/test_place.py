"""The place of a bundle: what may be there before, a link, a mount point, the current folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.bundle.folder import verify_bundle, write_bundle


def test_a_file_or_a_link_to_nothing_in_its_place_is_named(model: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out, what in ("file", "file"), ("link", "link to nothing"):
        with pytest.raises(ValueError, match=f"{out} is a {what}; give the name of a new folder"):
            write_bundle(model, tmp_path / out, name="tiny")
    assert (tmp_path / "link").is_symlink()


def test_an_older_bundle_is_replaced_completely(bundle: Path, model: Path):
    (model / "extra.json").write_text("{}")
    write_bundle(model, bundle, name="tiny2")
    assert verify_bundle(bundle) == []
    assert (bundle / "model/extra.json").exists()
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "slim"]


def test_what_a_killed_replacement_moved_aside_goes_with_the_next_one(bundle: Path, model: Path):
    bundle.replace(bundle.with_name(".bundle.old-killed"))
    write_bundle(model, bundle, name="tiny")
    assert verify_bundle(bundle) == []
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "slim"]


@pytest.mark.parametrize("older", [False, True])
def test_a_link_to_a_folder_stays_and_its_folder_is_the_bundle(model: Path, tmp_path: Path, older: bool):
    target, link = tmp_path / "volume" / "bundles", tmp_path / "link"
    target.mkdir(parents=True)
    link.symlink_to(target)
    if older:
        write_bundle(model, target, name="older")
    assert write_bundle(model, link, name="tiny") == link
    assert link.is_symlink() and verify_bundle(target) == []
    assert json.loads((target / "MANIFEST.json").read_text())["name"] == "tiny"
    assert sorted(path.name for path in (*tmp_path.iterdir(), *target.parent.iterdir())) == [
        *("bundles", "link", "slim", "volume")
    ]


def test_the_current_folder_and_those_above_it_are_refused(model: Path, tmp_path: Path, monkeypatch):
    """A shell would be left in a folder that is gone."""
    (tmp_path / "here").mkdir()
    write_bundle(model, tmp_path / "older", name="older")
    for folder, out in ("here", "."), ("here", tmp_path / "here"), ("older/model", ".."):
        monkeypatch.chdir(tmp_path / folder)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"is the current folder, or holds it, .*; start from outside it"):
            write_bundle(model, Path(out), name="tiny")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_mount_point_is_refused_before_any_work(model: Path, tmp_path: Path):
    """Of the same disk, too, which os.path.ismount does not see; in a namespace of its own."""
    (tmp_path / "a volume").mkdir()
    (tmp_path / "disk").mkdir()
    code = f"""
from pathlib import Path
from deploy.bundle.folder import write_bundle
try:
    write_bundle(Path({str(model)!r}), Path({str(tmp_path / "a volume")!r}), name="tiny")
except ValueError as error:
    print(error)
"""
    mount = 'mount --bind "$1" "$2" || exit 9; exec "$3" -P -c "$4"'
    words = ["unshare", "--mount", "sh", "-c", mount, "sh", tmp_path / "disk", tmp_path / "a volume", sys.executable]
    done = subprocess.run([*map(str, words), code], capture_output=True, text=True)
    if done.returncode == 9 or done.stderr.startswith("unshare:"):  # no right to mount
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.stdout == (
        f"{tmp_path}/a volume is a mount point, which cannot be replaced; name a new folder in it, "
        f"{tmp_path}/a volume/bundle\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a volume", "disk", "slim"]


@pytest.mark.parametrize("failing", [".bundle.old-", "bundle"])
def test_a_rename_that_fails_leaves_the_older_bundle_and_nothing_else(
    bundle: Path, model: Path, monkeypatch, failing: str
):
    before, replace = (bundle / "MANIFEST.json").read_bytes(), Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if Path(target).name.startswith(failing) and ".old-" not in path.name and Path(target).parent == bundle.parent:
            raise OSError(16, "Device or resource busy")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="busy"):
        write_bundle(model, bundle, name="newer")
    assert (bundle / "MANIFEST.json").read_bytes() == before and verify_bundle(bundle) == []
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "slim"]
