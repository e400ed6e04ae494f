"""What a regularizer reports about the layers of a model."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from comhe_ext.layers import LeftOut
from comhe_ext.output_layer import OutputLayer

ALL_FROZEN = (
    "CoMHE adds nothing: all weights that it regularizes are frozen. Where adapters are trained "
    "(LoRA), register the merged weight W + BA as a parametrization of the layer; its rows are the "
    "neurons"
)


class LayerEnergy(NamedTuple):
    """The energy of a layer, and two values to compare it with."""

    energy: float
    random: float  # expected energy of as many independent random directions
    lowest: float  # a bound that no directions undercut: the simplex bound, in half space Welch's


class Energies(dict[str, LayerEnergy]):
    """{layer: its energy}; `table()` shows it."""

    def table(self, format: str = "github") -> str:
        """Show the energies as a table, in one of the formats of the package tabulate."""
        rows = [(name, *values) for name, values in self.items()]
        return table(rows, ("layer", *LayerEnergy._fields), format)


class RegularizedLayer(NamedTuple):
    """A layer, and what `CoMHE` does with it."""

    name: str
    role: str  # "first", "hidden" or "output"
    sets: int  # with an energy each, as the groups of a convolution
    neurons: int  # N of each set
    inputs: int  # d of each neuron
    factor: float
    half_space: bool
    projected: bool
    learns: bool  # not frozen
    sampled: bool  # its energy is estimated from random blocks


def table(rows: Iterable[Iterable[object]], headers: Iterable[str], format: str) -> str:
    """Format a table with the package tabulate."""
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise ImportError(
            "a table needs the package tabulate: pip install 'comhe-ext[table]'"
        ) from error
    text: str = tabulate(list(rows), tuple(headers), tablefmt=format, floatfmt=".4f")
    return text


def summary(
    layers: Iterable[RegularizedLayer],
    left_out: Sequence[LeftOut],
    output: OutputLayer,
    projection: str,
    format: str,
) -> str:
    """Show a table of what is regularized and how, and of what is left out and why."""
    rows = [
        (
            layer.name,
            layer.role if layer.learns else f"{layer.role}, frozen",
            layer.sets,
            layer.neurons,
            layer.inputs,
            f"{layer.factor:g}",
            "half" if layer.half_space else "full",
            projection if layer.projected else "none",
            "sampled" if layer.sampled else "exact",
        )
        for layer in layers
    ]
    headers = (
        "layer",
        "as",
        "sets",
        "neurons",
        "inputs",
        "factor",
        "space",
        "projection",
        "energy",
    )
    text = table(rows, headers, format)
    text += f"\n\nOutput layer: {output.name!r}, {output.reason}."
    if left_out:
        text += "\n\n" + table(left_out, ("left out", "why"), format)
    return text
