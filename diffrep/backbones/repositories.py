"""Where a model's files come from: a folder, a cache of the hub, or a repository on the hub under one of its names.

Nothing is fetched unless the caller names something that lives on a hub, and then only the files that are needed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import torch

from diffrep.backbones.base import BackboneError
from diffrep.files import one_line, read_document, read_settings

MODELS = Path(__file__).resolve().parent.parent / "models"

_NAMES = read_settings(Path(__file__).with_name("names.toml"))
EMBEDDED: dict[str, str] = _NAMES["embedded"]  # name -> what it is
REPOSITORIES: dict[str, tuple[str, ...]] = {name: tuple(ids) for name, ids in _NAMES["repositories"].items()}
CLEANDIFT: dict[str, tuple[str, str]] = {name: (base, file) for name, (base, file) in _NAMES["cleandift"].items()}
TIMM: dict[str, str] = _NAMES["timm"]
WEIGHTS: dict[str, tuple[str, float]] = {name: (licence, size) for name, (licence, size) in _NAMES["weights"].items()}
REMOVED = frozenset(_NAMES["removed"])  # hub ids that answer no more, which a cache may still hold
HUB = {name: ids[0] for name, ids in REPOSITORIES.items()}  # short name -> the authors' hub id

_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(?:\.(?P<v>[a-z]\w*))?(?:-\d+-of-\d+)?(?:\.(?P<w>[a-z]\w*))?\.safetensors"
)
_log = logging.getLogger("diffrep")


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors of a component's folder in one variant (None: the plain ones): a whole file, or its shards."""
    matches = {file: match for file in sorted(folder.glob("*.safetensors")) if (match := _WEIGHTS.fullmatch(file.name))}
    files = [file for file, match in matches.items() if (match["v"] or match["w"]) == variant]
    whole = [file for file in files if "-of-" not in file.name]
    return whole[:1] or files


def expand(name: str | os.PathLike[str]) -> str:
    """A name or path as text, with a leading ``~`` that the shell left because it was quoted."""
    if not isinstance(name, (str, os.PathLike)):
        raise BackboneError(f"a backbone is named by text or a path, got {type(name).__name__}")
    text = os.fspath(name)
    if not text:
        raise BackboneError("the name of a model is empty")
    return os.path.expanduser(text) if text.startswith("~") else text


def with_options(
    name: str | os.PathLike[str],
    *,
    lora: Sequence[str | os.PathLike[str]] = (),
    variant: str | None = None,
    revision: str | None = None,
) -> str:
    """The name of a backbone with its options, which `load_backbone` takes; stores, probes and workers keep it.

    >>> with_options("sd1.5", lora=["style.safetensors:0.5"], variant="fp16")
    'sd1.5?variant=fp16&lora=style.safetensors:0.5'
    """
    values = [("variant", variant), ("revision", revision), *(("lora", os.fspath(file)) for file in lora)]
    query = urlencode([(key, value) for key, value in values if value], safe="/:~", quote_via=quote)
    return expand(name) + ("?" + query if query else "")


def split_options(name: str) -> tuple[str, dict[str, Any]]:
    """The other way round: a name and the arguments of `load_backbone` that it holds.

    >>> split_options("sd1.5?variant=fp16&lora=style.safetensors:0.5")
    ('sd1.5', {'variant': 'fp16', 'lora': ('style.safetensors:0.5',)})

    Raises:
        BackboneError: an option is none of those.
    """
    base, mark, query = name.rpartition("?")
    if not mark or Path(name).exists():
        return name, {}
    values = parse_qs(query, keep_blank_values=True)
    if unknown := sorted(set(values) - {"variant", "revision", "lora"}):
        raise BackboneError(f"{name}: the options behind a name are variant, revision and lora, got {unknown[0]}")
    options: dict[str, Any] = {key: value[-1] for key, value in values.items() if key != "lora"}
    return base, options | ({"lora": tuple(values["lora"])} if "lora" in values else {})


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``ORGANISATION/NAME``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def looks_like_path(name: str) -> bool:
    """Whether a name can be nothing but a path: no short name, and no hub id."""
    return (name.startswith(".") or os.sep in name) and not is_hub_id(name)


def whole_of(folder: Path) -> Path | None:
    """The diffusers folder of which a folder is a part."""
    parent = folder.resolve().parent
    return parent if (parent / "model_index.json").is_file() else None


def cached_snapshot(folder: Path, revision: str | None = None) -> Path | None:
    """The files in a cache folder of the hub, ``models--ORG--NAME``: those of a revision, or of the only snapshot."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    if commit and re.fullmatch(r"[\w.-]+", commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    commits = [path for path in snapshots.iterdir() if path.is_dir()]
    return commits[0] if len(commits) == 1 and revision is None else None


def _in_cache(hub_id: str, revision: str | None) -> Path | None:
    """The files of a repository in the local cache of the hub."""
    from huggingface_hub import constants

    return cached_snapshot(Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}", revision)


def without_fetching(name: str) -> str | None:
    """A model that a file names and the user does not, where it is on this machine: nothing is fetched for a file.

    Returns:
        An embedded model's name, a folder or file, or the folder of a repository in the local cache of the hub; None
        where it would have to be fetched.

    Raises:
        BackboneError: there are options behind the name that no backbone has.
    """
    base, options = split_options(expand(name))
    if base in EMBEDDED or Path(base).exists():
        return name
    revision = options.pop("revision", None)
    for hub_id in REPOSITORIES.get(base, (base,) if is_hub_id(base) else ()):
        if (snapshot := _in_cache(hub_id, revision)) is not None:
            return with_options(snapshot, **options)
    return None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of `diffrep.backbones.load_backbone` that loaders need."""

    name: str
    device: torch.device
    dtype: torch.dtype
    stride: int | None = None
    variant: str | None = None
    revision: str | None = None
    lora: tuple[str, ...] = ()
    adm: Mapping[str, Any] | None = None
    weights: bool = True
    decoder: bool = False


class Repository:
    """The files of one model, wherever they are.

    Args:
        name: an embedded model, a short name, a folder, a cache folder ``models--ORG--NAME``, or a hub id; the other
            two may stand behind it, as `with_options` writes them.
        revision: of a repository on the hub: a branch, a tag or a commit.
        variant: of the weight files, for example "fp16"; None: the plain ones, or the only others.

    Raises:
        BackboneError: it is none of these; or a revision is asked of a folder.
    """

    def __init__(
        self, name: str | os.PathLike[str], *, revision: str | None = None, variant: str | None = None
    ) -> None:
        self.name, behind = split_options(expand(name))
        self.revision, self.variant = revision or behind.get("revision"), variant or behind.get("variant")
        revision = self.revision
        folder = MODELS / self.name if self.name in EMBEDDED else Path(self.name)
        self.folder: Path | None = None
        self.ids: tuple[str, ...] = ()
        if folder.is_dir():
            if caches := sorted(path.name for path in folder.glob("models--*--*") if path.is_dir()):
                raise BackboneError(f"{folder}: is a cache of the hub; give a model in it, such as {caches[0]}")
            self.folder = cached_snapshot(folder, revision) or folder
            if self.folder == folder and any((folder / part).is_dir() for part in ("snapshots", "blobs")):
                several = any(folder.glob("snapshots/*"))
                raise BackboneError(
                    f"{folder}: is a cache of the hub without one snapshot"
                    f" {revision or 'that refs/main names'}: "
                    + ("give the folder snapshots/COMMIT in it" if several else "it holds none, fetch the model again")
                )
            if revision is not None and self.folder == folder:
                raise BackboneError(f"{self.name}: is a folder, which has no revision {revision}")
            return
        known = (ids for ids in REPOSITORIES.values() if self.name in ids)
        self.ids = REPOSITORIES.get(self.name) or tuple(dict.fromkeys((self.name, *next(known, ()))))
        if not is_hub_id(self.ids[0]):
            raise BackboneError(f"{self.name}: no such folder, and no name of a model on the hub (ORGANISATION/NAME)")

    @property
    def _place(self) -> _Place:
        if self.folder is not None:
            return _Place(str(self.folder), self.folder)
        return _find(self.name, self.ids, self.revision)

    @property
    def label(self) -> str:
        """What messages call it: the folder, or the hub id that answered."""
        return self._place.label

    def check(self) -> None:
        """Ask whether the model is there.

        Raises:
            BackboneError: the hub has no such repository, or cannot be reached and the model is not in its cache.
        """
        _ = self._place

    @cached_property
    def files(self) -> frozenset[str]:
        """The names of all files, with ``/``, down to the folders of the components."""
        place = self._place
        if place.root is None:
            return place.files
        paths = [path for pattern in ("*", "*/*") for path in place.root.glob(pattern)]
        return frozenset(path.relative_to(place.root).as_posix() for path in paths)

    def has(self, part: str) -> bool:
        """Whether there is a component of that name."""
        return any(file.startswith(f"{part}/") for file in self.files)

    def fetch(self, files: Iterable[str]) -> Path:
        """The folder that holds these files, after what is missing has been fetched."""
        from huggingface_hub import snapshot_download

        if self._place.root is not None:
            return self._place.root
        try:
            return Path(snapshot_download(self.label, revision=self.revision, allow_patterns=sorted(files)))
        except Exception as error:  # the hub's clients raise OSError, ValueError and those of two HTTP libraries
            raise BackboneError(f"{self.label}: cannot be fetched from the hub ({one_line(error)})") from None

    def json(self, file: str, *, required: bool = True) -> dict[str, Any]:
        """A JSON file of the model; empty where it is missing and not required.

        Raises:
            BackboneError: it is missing, or holds no JSON object.
        """
        if file not in self.files:
            if required:
                raise BackboneError(f"{self.label}: {file} is missing")
            return {}
        return read_document(self.fetch([file]) / file, error=BackboneError)

    def only_weights(self, *endings: str) -> Path:
        """The one weight file at the top; of several kinds, that of the first kind that there is.

        Raises:
            BackboneError: there is none, or there are several.
        """
        if ".pt" not in endings:
            self.refuse_pickles("")
        names = [sorted(f for f in self.files if "/" not in f and f.endswith(ending)) for ending in endings]
        files = next(filter(None, names), [])
        if len(files) != 1:
            expected = " or ".join(endings)
            raise BackboneError(f"{self.label}: expected one {expected} file beside config.json, found {len(files)}")
        return self.fetch(files) / files[0]

    def part(self, part: str, *, need: bool = True) -> tuple[Path, str | None]:
        """The folder that holds a component's configuration and weights, and the variant of its weight files.

        Args:
            need: the variant that was asked for must be there; otherwise a component without it is read as it is.

        Raises:
            BackboneError: the component has no weights that can be read, or not in this variant.
        """
        names = [file.removeprefix(f"{part}/") for file in self.files if file.startswith(f"{part}/")]
        variants = self._variants(part)
        variant = self._chosen(part, set(variants.values()), need)
        wanted = [f"{part}/{name}" for name, of in variants.items() if of == variant]
        wanted += [f"{part}/{name}" for name in names if name.endswith((".json", ".txt", ".model"))]
        return self.fetch(wanted), variant

    def check_variant(self, part: str) -> None:
        """Refuse a variant that was asked for and that a component does not have; nothing is fetched.

        Raises:
            BackboneError: naming those that there are.
        """
        if self.variant is not None:
            self._chosen(part, set(self._variants(part).values()), need=True)

    def _variants(self, part: str) -> dict[str, str | None]:
        """The weight files of a component, each with its variant."""
        names = (file.removeprefix(f"{part}/") for file in self.files if file.startswith(f"{part}/"))
        return {name: match["v"] or match["w"] for name in names if (match := _WEIGHTS.fullmatch(name))}

    def refuse_pickles(self, part: str) -> None:
        """Refuse a component, or the model itself where `part` is empty, whose weights are pickles alone.

        Raises:
            BackboneError: it has a pickle and no safetensors; the message says how to make them.
        """
        prefix = f"{part}/" if part else ""
        names = [f.removeprefix(prefix) for f in self.files if f.startswith(prefix)]
        names = [name for name in names if "/" not in name]
        others = sorted(name for name in names if Path(name).suffix in (".bin", ".ckpt", ".pt", ".pth"))
        if not others or any(name.endswith(".safetensors") for name in names):
            return
        safe = "model" if others[0].startswith("pytorch_model") else Path(others[0]).stem
        raise BackboneError(
            f"{self.label}: {part or 'it'} has {others[0]} alone, a pickle, which is not read: save it as safetensors,"
            ' `python -c "import torch; from safetensors.torch import save_file; save_file(dict('
            f"torch.load('{others[0]}', weights_only=True)), '{safe}.safetensors', dict(format='pt'))\"`"
            f" in {part or 'its folder'}"
        )

    def tensors(self, part: str) -> set[str]:
        """The names of a component's tensors, of the safetensors that lie on this machine and can be read."""
        from safetensors import SafetensorError, safe_open

        names: set[str] = set()
        root = self._place.root or _in_cache(self.label, self.revision)
        for file in () if root is None else root.glob(f"{part}/*.safetensors"):
            with suppress(SafetensorError, OSError), safe_open(file, "pt") as opened:
                names |= set(opened.keys())
        return names

    def _chosen(self, part: str, variants: set[str | None], need: bool) -> str | None:
        if not variants:
            self.refuse_pickles(part)
            raise BackboneError(f"{self.label}: {part} has no weights (*.safetensors)")
        listed = ", ".join(sorted(v or "the plain one" for v in variants))
        if self.variant is not None and self.variant in variants:
            return self.variant
        if self.variant is not None and need:
            raise BackboneError(f"{self.label}: {part} has no variant {self.variant}; there is {listed}")
        if None in variants:
            return None
        if len(variants) > 1:
            raise BackboneError(f"{self.label}: {part} comes in several variants, say which: {listed}")
        return next(iter(variants))


@dataclass(frozen=True)
class _Place:
    """Where the files of a model lie: in a folder, or on the hub where there is none."""

    label: str
    root: Path | None = None
    files: frozenset[str] = frozenset()  # on the hub


@lru_cache(maxsize=32)
def _find(name: str, ids: tuple[str, ...], revision: str | None) -> _Place:
    """The first of some hub ids that answers, asked once; where the hub cannot be reached, the first in its cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    offline = False
    for hub_id in ids:
        try:
            info = HfApi().model_info(hub_id, revision=revision, timeout=10)
        except GatedRepoError:
            raise BackboneError(
                f"{hub_id}: asks you to accept its licence first, at https://huggingface.co/{hub_id}; then"
                " log in with `hf auth login`"
            ) from None
        except RepositoryNotFoundError:
            continue
        except RevisionNotFoundError:
            raise BackboneError(f"{hub_id}: has no revision {revision}") from None
        except Exception:  # no connection: the clients of two HTTP libraries raise their own
            offline = True
            break
        _note(name, ids, hub_id)
        return _Place(hub_id, files=frozenset(sibling.rfilename for sibling in info.siblings or ()))
    for hub_id in ids:
        if (snapshot := _in_cache(hub_id, revision)) is not None:
            _note(name, ids, hub_id)
            return _Place(hub_id, snapshot)
    tried = f"{name} ({', '.join(ids)})" if ids != (name,) else name
    if offline:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
        there = next((hub_id for hub_id in ids if hub_id not in REMOVED), ids[0])
        raise BackboneError(
            f"{tried}: is no folder here, the hub cannot be reached ({why}) and the model is not in its local cache;"
            f" where there is a connection, `hf download {there}` and give its folder here instead"
        )
    raise BackboneError(
        f"{tried}: huggingface.co has no such repository (misspelt, moved, or private: then `hf auth login`);"
        " or give a local folder"
    )


def _note(name: str, ids: tuple[str, ...], hub_id: str) -> None:
    """Say once that another repository is used than the one that was meant."""
    meant = ids[0] if name in REPOSITORIES else name
    if hub_id != meant:
        moved = f"{name} has moved" + (f" from {meant}" if meant != name else "")
        _log.warning("diffrep: %s: using %s", moved, hub_id)


def repository(
    name: str | os.PathLike[str] | Repository, *, revision: str | None = None, variant: str | None = None
) -> Repository:
    """The files of a model."""
    return name if isinstance(name, Repository) else Repository(name, revision=revision, variant=variant)
