"""A results folder that may hold other people's files too: a command replaces only what it wrote itself."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_cwdpo.cli.errors import CommandError


class OutputFolder:
    """
    The part of a folder that a command owns. Names of the files it has written are kept in a list beside them, so that
    a later run can tell them from others'.

    Args:
        path (`Path`):
            The folder.
        command (`str`):
            The command's name; it gives the list its name.
        owned (`tuple[str, ...]`):
            Names in the folder that the command writes: files, or folders with files.
    """

    def __init__(self, path: Path, command: str, owned: tuple[str, ...]) -> None:
        self.path = path
        self.owned = owned
        self._list = path / f".{command}-files.json"

    def claim(self) -> bool:
        """
        Create the folder, or remove what an earlier run has left in it.

        Returns:
            `bool`: Whether there was something to remove.

        Raises:
            CommandError: If a file that no earlier run wrote stands where this one would write, or the folder cannot
                be written to. Nothing has been removed then.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            known = self._known()
            foreign = sorted(self._present() - known)
            if foreign:
                raise CommandError(
                    f"{self.path} holds files that this command did not write (such as {foreign[0]}) where its "
                    "results would go. Move them away, or choose another folder with --output_dir."
                )
            # Every file below these names is in the list, as was just checked.
            for name in self.owned:
                _remove(self.path / name)
            self._remember(set())
        except OSError as error:
            raise CommandError(f"The output folder {self.path} cannot be used: {error}") from error
        return bool(known)

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """
        An empty folder to write to, which becomes the subfolder `name` when the block ends without an error.

        Args:
            name (`str`):
                One of the owned names.
        """
        with tempfile.TemporaryDirectory(dir=self.path, prefix=f".{name}-") as aside:
            fresh = Path(aside) / name
            fresh.mkdir()
            yield fresh
            written = {(Path(name) / file.relative_to(fresh)).as_posix() for file in _files(fresh)}
            # Listed before they appear: an interruption in between leaves no file that the next run takes for foreign.
            self._remember(self._known() | written)
            fresh.rename(self.path / name)

    def write(self, name: str, text: str) -> Path:
        """
        Write a text file.

        Args:
            name (`str`):
                One of the owned names.
            text (`str`):
                The content.

        Returns:
            `Path`: The file.
        """
        self._remember(self._known() | {name})
        file = self.path / name
        file.write_text(text, encoding="utf-8")
        return file

    def _present(self) -> set[str]:
        found = [path for name in self.owned for path in _files(self.path / name)]
        return {path.relative_to(self.path).as_posix() for path in found}

    def _known(self) -> set[str]:
        try:
            return set(json.loads(self._list.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return set()
        except ValueError as error:
            raise CommandError(
                f"{self._list} is damaged, so it is unknown which files may be replaced. Remove it together with "
                f"{', '.join(self.owned)}, or choose another folder with --output_dir."
            ) from error

    def _remember(self, names: set[str]) -> None:
        self._list.write_text(json.dumps(sorted(names), indent=1) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if not file.is_dir()]
