"""Converts tensors between torch's state dicts and our trees with a table, bit for bit."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dino_jax.errors import UsageError, listed
from dino_jax.weights.layouts.dino import FAMILIES, Layout, Table

PyTree = Any


def to_ours(
    tensors: Mapping[str, np.ndarray], family: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Converts the tensors of a torch network to our trees.

    Args:
      tensors: the tensors by their names in the network's `state_dict()`, without any prefix.
      family: a key of `tables.FAMILIES`.
    Returns: (params, batch_stats, counts): nested dicts like those of `models.network.split`. The
      arrays have the dtypes of the tensors and are mostly views of them. `counts` contains the
      `num_batches_tracked` of every BatchNorm, which is only needed to export.
    Raises:
      UsageError: a tensor does not match exactly one row of the table or has a wrong number of
        axes, or a row has no tensor. The message lists ten problems.
    """
    matches, problems = _assign(tensors, family, of_torch=True)
    for match in matches:
        shape = tensors[match.torch].shape
        if len(shape) != match.layout.ndim:
            problems.append(
                f"{match.torch} has shape {list(shape)}, expected {match.layout.ndim} axes"
            )
    if problems:
        raise UsageError(f"these are not the tensors of a {family}: {listed(problems, 10, '; ')}")
    params, batch_stats, counts = {}, {}, {}
    for match in matches:
        path = tuple(int(part) if part.isdigit() else part for part in match.ours.split("."))
        tree = {"mean": batch_stats, "var": batch_stats, "count": counts}.get(path[-1], params)
        tree[path] = match.layout.to_ours(tensors[match.torch])
    return unflatten_dict(params), unflatten_dict(batch_stats), unflatten_dict(counts)


def to_torch(
    params: PyTree,
    batch_stats: PyTree,
    family: str,
    *,
    counts: PyTree | None = None,
    in_channels: int = 3,
) -> dict[str, np.ndarray]:
    """Converts our trees to tensors with the names, layouts and order of the reference.

    Args:
      params: pure dict of parameters, as returned by `models.network.split`.
      batch_stats: pure dict of running statistics.
      family: a key of `tables.FAMILIES`.
      counts: `num_batches_tracked` as returned by `to_ours`; zeros by default.
      in_channels: image channels, which a ViT's patch embedding does not determine.
    Returns: arrays by name, with unchanged dtypes, mostly views.
    Raises:
      UsageError: an array does not match exactly one row of the table, or a row has no array. The
        message lists ten problems.
    """
    arrays = _dotted(params) | _dotted(batch_stats)
    if counts is None:
        norms = [path.removesuffix(".mean") for path in arrays if path.endswith(".mean")]
        arrays |= {f"{norm}.count": np.zeros((), np.int64) for norm in norms}
    else:
        arrays |= _dotted(counts)
    matches, problems = _assign(arrays, family, of_torch=False)
    if problems:
        raise UsageError(f"these are not the arrays of a {family}: {listed(problems, 10, '; ')}")
    return {
        match.torch: match.layout.to_torch(np.asarray(arrays[match.ours]), in_channels)
        for match in sorted(matches, key=lambda match: match.place)
    }


def torch_shapes(
    params: PyTree, batch_stats: PyTree, family: str, *, in_channels: int = 3
) -> dict[str, np.ndarray]:
    """Like `to_torch`, but takes abstract arrays, and the returned arrays use no memory.

    Use it to compare a file with an abstract model by the names in the file.
    """

    def empty(leaf: Any) -> np.ndarray:
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)

    trees = (
        {path: empty(leaf) for path, leaf in _dotted(t).items()} for t in (params, batch_stats)
    )
    return to_torch(*trees, family, in_channels=in_channels)


def shape_problems(found: PyTree, expected: PyTree) -> list[str]:
    """Lists all differences in names and shapes between two trees.

    Args:
      found: a tree of arrays or abstract arrays, for example tensors by name.
      expected: another one, for example from `torch_shapes` or `models.network.abstract`.
    """
    found, expected = _dotted(found), _dotted(expected)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    return problems + [
        f"{name} is {list(found[name].shape)}, not {list(leaf.shape)}"
        for name, leaf in expected.items()
        if name in found and found[name].shape != leaf.shape
    ]


def _dotted(tree: PyTree) -> dict[str, Any]:
    """The leaves of nested dicts by their dotted paths; flat dicts are unchanged."""
    return {".".join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


class _Match(NamedTuple):
    """A tensor and its row in the table."""

    torch: str
    ours: str
    layout: Layout
    place: tuple[int, ...]  # sort key for torch's order


def _assign(names: Iterable[str], family: str, *, of_torch: bool) -> tuple[list[_Match], list[str]]:
    """The matches and problems with the best table of a family, which has fewest problems."""
    if family not in FAMILIES:
        raise UsageError(f"family={family!r} is unknown: choose one of {', '.join(FAMILIES)}")
    results = [_match(names, table, of_torch=of_torch) for table in FAMILIES[family]]
    return min(results, key=lambda result: len(result[1]))


def _match(names: Iterable[str], table: Table, *, of_torch: bool) -> tuple[list[_Match], list[str]]:
    matches, problems, empty = [], [], dict.fromkeys(table)
    for name in names:
        matching = []
        for torch, (ours, layout) in table.items():
            numbers = _read(torch if of_torch else ours, name)
            if numbers is not None:
                empty.pop(torch, None)
                place = _place(torch, numbers, table)
                matching.append(
                    _Match(_write(torch, numbers), _write(ours, numbers), layout, place)
                )
        if len(matching) == 1:
            matches += matching
        else:
            problems.append(f"{name!r} matches {len(matching) or 'no'} rows")
    missing = (torch if of_torch else table[torch][0] for torch in empty)
    return matches, problems + [f"{template} is missing" for template in missing]


_NUMBER = re.compile(r"\{(\d*)([a-z])(?:\+(\d+))?\}")  # {2i+1}: factor, letter, offset


@cache
def _pattern(template: str) -> tuple[re.Pattern[str], list[tuple[int, str, int]]]:
    """Compiles a template to a pattern, and its numbers as (factor, letter, offset)."""
    texts = [re.escape(text) for text in _NUMBER.sub("\0", template).split("\0")]
    numbers = [(int(f or 1), letter, int(o or 0)) for f, letter, o in _NUMBER.findall(template)]
    return re.compile("(0|[1-9][0-9]{0,5})".join(texts)), numbers


def _read(template: str, name: str) -> dict[str, int] | None:
    """The numbers that turn a template into `name`; None if it does not match."""
    pattern, numbers = _pattern(template)
    if (found := pattern.fullmatch(name)) is None:
        return None
    values = {}
    for (factor, letter, offset), text in zip(numbers, found.groups(), strict=True):
        values[letter], remainder = divmod(int(text) - offset, factor)
        if remainder or values[letter] < 0:
            return None
    return values


def _write(template: str, values: Mapping[str, int]) -> str:
    """Fills numbers into a template."""
    return _NUMBER.sub(lambda m: str(int(m[1] or 1) * values[m[2]] + int(m[3] or 0)), template)


def _place(template: str, values: Mapping[str, int], table: Table) -> tuple[int, ...]:
    """A sort key by row that keeps rows with the same prefix and number together."""
    place = []
    for marker in _NUMBER.finditer(template):
        beginning = template[: marker.start()]
        first = next(i for i, torch in enumerate(table) if torch.startswith(beginning))
        place += [first, int(_write(marker[0], values))]
    return (*place, list(table).index(template))
