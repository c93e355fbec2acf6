"""What a method is: a name, its parameters, the modes it is defined for, and the function that selects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from vecattention import checks
from vecattention.spec import Selection

Selector = Callable[..., Selection]


@dataclass(frozen=True)
class Knob:
    """The parameter that trades density for recall.

    Attributes:
        name: of the parameter.
        sweep: values from sparse to dense, the published ones among them.
        sparse, dense: the ends of its range; ``log`` when the way between them is geometric.
    """

    name: str
    sweep: tuple[float, ...]
    sparse: float
    dense: float
    log: bool = False


@dataclass(frozen=True)
class Method:
    """A way to choose keys; every one returns a `Selection`, and all run on `vecattention.attend`.

    Attributes:
        name: as in `vecattention.methods.get`.
        source: the publication.
        modes: values of ``causal`` that the method is defined for.
        parameters: names and default values of the method's own parameters.
        knob: the parameter to turn for another density, or None.
        takes_value: whether ``value=`` helps the selection.
    """

    name: str
    source: str
    modes: tuple[bool, ...]
    parameters: Mapping[str, object]
    knob: Knob | None
    selector: Selector
    takes_value: bool = False

    def select(
        self, query: Tensor, key: Tensor, *, causal: bool, scale: float | None = None, **parameters: object
    ) -> Selection:
        """Which keys each block of queries attends, by this method.

        Args:
            query: [B, H, Sq, D].
            key: [B, Hkv, Sk, D]; query head h reads key head h // (H // Hkv).
            causal: whether row i sees only keys at positions up to i + Sk - Sq.
            scale: factor of the dot products; None means D ** -0.5.
            **parameters: of this method, see `parameters`; each is described in the method's module.

        Returns:
            The `Selection`, on the device of the query.

        Raises:
            TypeError: a parameter that the method does not have, or of the wrong type.
            ValueError: shapes that do not fit, a mode that the method is not defined for, a value out of range.

        Example:
            >>> import torch, vecattention.methods
            >>> query, key = torch.randn(1, 4, 600, 64), torch.randn(1, 2, 600, 64)
            >>> vecattention.methods.get("xattention").select(query, key, causal=True, threshold=0.5).density().shape
            torch.Size([1, 4])
        """
        if not isinstance(causal, bool):
            raise TypeError(f"causal is {causal!r} ({type(causal).__name__}), wanted True or False; pass a bool")
        if causal not in self.modes:
            raise ValueError(
                f"causal is {causal}, wanted {self.modes[0]}: {self.name} is not defined otherwise; "
                f"pick another of vecattention.methods.names()"
            )
        unknown = sorted(set(parameters) - set(self.parameters) - ({"value"} if self.takes_value else set()))
        if unknown:
            raise TypeError(
                f"{unknown[0]!r} is no parameter of {self.name}, wanted one of {tuple(self.parameters)}; "
                "leave it out or correct its name"
            )
        checks.tensors(causal, query=query, key=key)
        factor = checks.scale_of(scale, query.shape[3])
        return self.selector(query, key, causal=causal, scale=factor, **(dict(self.parameters) | parameters))
