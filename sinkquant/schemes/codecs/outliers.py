"""What of a packed weight stands beside its codes: whole input columns and single weights, in 16 bits each."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outliers:
    """Added to what the codes give. Codes of `columns` are zero, so that there the sum is `exact`; a weight at
    `places` left its group as a summand of its own (a super weight, Yu et al. 2411.07191).

    columns: int32 [k], ascending; exact: 16-bit float [rows, k]. places: int32 [n, 2], (row, column); values: 16-bit
    float [n].
    """

    columns: torch.Tensor
    exact: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor | None], rows: int, dtype: torch.dtype) -> Outliers | None:
        """From the tensors of a checkpoint, by the end of their names; None where there are none of them."""
        columns, places = tensors.get("weight_columns"), tensors.get("weight_places")
        if columns is None and places is None:
            return None
        exact, values = tensors.get("weight_exact"), tensors.get("weight_values")
        device = next(tensor.device for tensor in (columns, places) if tensor is not None)
        none = torch.empty(0, dtype=torch.int32, device=device)
        return cls(none if columns is None else columns,
                   torch.empty(rows, 0, dtype=dtype, device=device) if exact is None else exact,
                   none.reshape(0, 2) if places is None else places, none.to(dtype) if values is None else values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it, by the end of the tensor's name."""
        found: dict[str, torch.Tensor] = {}
        if len(self.columns):
            found |= {"weight_columns": self.columns, "weight_exact": self.exact}
        if len(self.places):
            found |= {"weight_places": self.places, "weight_values": self.values}
        return found

    def to(self, device: torch.device | str) -> Outliers:
        """The same on another device."""
        return Outliers(self.columns.to(device), self.exact.to(device), self.places.to(device),
                        self.values.to(device))

    def add_to(self, dense: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Add it to float32 rows of the weight in place, [some rows, columns], the first of them row `start`."""
        rows = slice(start, start + len(dense))
        if len(self.columns):
            dense[:, self.columns.long()] += self.exact[rows].float()
        if len(self.places):
            here = (self.places[:, 0] >= rows.start) & (self.places[:, 0] < rows.stop)
            at = self.places[here].long()
            dense[at[:, 0] - start, at[:, 1]] += self.values[here].float()
        return dense

    def times(self, inputs: torch.Tensor) -> torch.Tensor:
        """What it adds to the product with inputs [tokens, columns]: [tokens, rows] in their dtype."""
        added = inputs[:, self.columns.long()] @ self.exact.to(inputs.dtype).T
        if len(self.places):
            at = self.places.long()
            added.index_add_(1, at[:, 0], inputs[:, at[:, 1]] * self.values.to(inputs.dtype))
        return added
