"""What rounding inputs to FP4 leaves in what linears give, by their role, with channels as they are and transformed:

    python evals/benchmarks/input_errors.py MODEL [--text FILE] [--rows 2] [--length 256]

The mean over the blocks of |(Q(x T) - x T) T^-1 W|^2 / |x W|^2 on rows of the text, the first position left out;
weights are not rounded. "no room": the stored scale of NVFP4 inputs reaches the largest of calibration and no further.
"sorted": channels in the order of their size, so that a block holds channels of one size; "Hadamard" in blocks of the
format, and of all channels; "smoothed": divided as SmoothQuant divides them. Sizes and stored scales are of the
calibration text. All but the Hadamard matrix in front of a down projection fold into the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.models.inputs import ROOM, InputSwitch, RoundedInputs, input_args, static_scale
from sinkquant.quantize.transforms.hadamard import Rotation
from sinkquant.schemes import input_format

Turn = Callable[[torch.Tensor], torch.Tensor]
NO_ROOM = "no room"


def seen(decoder: Decoder, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Linear -> its inputs, [rows, length, columns], of those that read one input the first."""
    found: dict[str, torch.Tensor] = {}
    firsts = {name for name, one in decoder.shape("").linears.items() if (one.fused_with or [name])[0] == name}
    handles = [decoder.linears[name].register_forward_pre_hook(
        lambda _, args, name=name: found.__setitem__(name, args[0].detach())) for name in firsts]
    with torch.no_grad():
        decoder.model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def transforms(calibration: torch.Tensor, weight: torch.Tensor, size: int) -> dict[str, tuple[Turn, Turn]]:
    """Name -> what becomes of inputs, and of the columns of the weight."""
    tokens = calibration[:, 1:].flatten(0, 1)
    order, width = tokens.square().mean(0).argsort(), tokens.shape[1]
    scale = (tokens.abs().amax(0).clamp(min=1e-5) / weight.abs().amax(0).clamp(min=1e-5)).sqrt()

    def mixed(channels: int) -> tuple[Turn, Turn]:
        rotation = Rotation(channels, 0)
        return (lambda x: rotation.apply(x.double()).float(),) * 2

    same: tuple[Turn, Turn] = (lambda x: x, lambda w: w)
    return {"as they are": same, NO_ROOM: same, "sorted": (lambda x: x[..., order], lambda w: w[:, order]),
            "Hadamard, blocks": mixed(size), "Hadamard, all": mixed(width),
            "smoothed": (lambda x: x / scale, lambda w: w * scale)}


def main() -> None:
    """Print a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", help="default: the packaged evaluation text")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, decoder = load_tokenizer(folder), Decoder.of(load_model(folder, torch.float32))
    texts = read_text(None, "calibration"), read_text(arguments.text, "evaluation")
    calibration, held_out = (seen(decoder, token_rows(tokenizer, text, arguments.rows, arguments.length))
                             for text in texts)
    errors: dict[tuple[str, str], dict[str, list[float]]] = {}
    for form in ("nvfp4", "mxfp4"):
        args, size = input_args(form, "group"), input_format(form).group_size or 0
        for name, inputs in held_out.items():
            weight = decoder.weight(name).float()
            whole = (inputs @ weight.T)[:, 1:].square().sum()
            for how, (of_inputs, of_weight) in transforms(calibration[name], weight, size).items():
                known, turned = of_inputs(calibration[name]), of_inputs(inputs)
                stored = static_scale(known.min(), known.max(), args, torch.float32) if form == "nvfp4" else None
                if stored is not None and how == NO_ROOM:
                    stored = stored * ROOM
                rounded = RoundedInputs(args, InputSwitch(), stored).rounded(turned)
                left = ((rounded - turned) @ of_weight(weight).T)[:, 1:].square().sum()
                row = errors.setdefault((form, name.rpartition(".")[2]), {})
                row.setdefault(how, []).append(float(left / whole))
    kinds = list(next(iter(errors.values())))
    print(f"| inputs | read by | {' | '.join(kinds)} |\n|---|---|{'---:|' * len(kinds)}")
    for (form, role), row in errors.items():
        print(f"| {form} | {role} | {' | '.join(f'{sum(row[kind]) / len(row[kind]):.4f}' for kind in kinds)} |")


if __name__ == "__main__":
    main()
