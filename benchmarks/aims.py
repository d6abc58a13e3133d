"""What was to be reached on an H200 in 16 bits, beside what was measured: tables for report.py."""

from __future__ import annotations

# {(N, K): {work: {rank: (masks of ones, masks)}}}, over the frozen GEMM(s) at M 8192
SQUARE = {"forward": {16: (1.12, 1.17), 64: (1.15, 1.20)}, "forward+backward": {16: (1.15, 1.20), 64: (1.19, 1.24)}}
LONG = {"forward": {16: (1.10, 1.13), 64: (1.12, 1.15)}, "forward+backward": {16: (1.11, 1.14), 64: (1.13, 1.16)}}
LAYERS = {(4096, 4096): SQUARE, (11008, 4096): LONG, (4096, 11008): LONG}
GRAPH = {"graph: forward": {16: (1.8, 2.0), 64: (1.9, 2.1)}, "graph: forward+backward": {16: (2.0, 2.2), 64: (2.1, 2.3)}}
OTHERS = (  # (what, work, peer, aim)
    ("host time of one forward call, device idle, over F.linear's: masks of ones", "host time a call", "apt none", 1.8),
    ("the same: masks", "host time a call", "apt masks", 1.8),
    ("merge_ 4096 x 4096 over one in-place pass: check=False", "merge_", "merge_ check=False", 1.1),
    ("the same: check=True", "merge_", "merge_ check=True", 1.6),
    ("merge_ of every linear of a 1.1 B model over PEFT's merge", "merge, 1.1 B model", "merge_ check=False", 0.12),
    ("mask_grads_ of 448 tensors over one copy of the same bytes, one launch", "mask_grads_ of 448", "mask_grads_", 1.3),
)
WIDTHS = (4097, 2055, 383)
KEPT = (  # (what, work, full-size aim, compact in and out)
    ("half of both sides, forward", "50% of both kept: fwd", 0.42, 0.35),
    ("the same, forward + backward", "50% of both kept: f+b", 0.46, 0.38),
    ("40 % of both sides, forward", "40% of both kept: fwd", 0.33, None),
    ("half of the inputs, forward", "50% of in kept: fwd", 0.66, None),
    ("half of the outputs, forward", "50% of out kept: fwd", 0.66, None),
)
BESIDE = ("PEFT, none", "mm + addmm_, none", "naive eager, masks")


def _ratio(rows, **case):
    return next(row["ratio"] for row in rows if case.items() <= row.items())


def _aimed(value, aim):
    return f"{value:.2f}" if aim is None else f"{value:.2f} ({aim:.2f})"


def layers(rows):
    lines = []
    for (N, K), works in LAYERS.items():
        for work, ranks in works.items():
            for rank, (none, masks) in ranks.items():
                case = {"work": work, "M": 8192, "N": N, "K": K, "rank": rank}
                cells = [_aimed(_ratio(rows, **case, peer=p), a) for p, a in (("apt none", none), ("apt masks", masks))]
                lines.append(
                    [work.replace("+", " + "), f"{N}, {K}", str(rank), *cells, *(f"{_ratio(rows, **case, peer=p):.2f}" for p in BESIDE)]
                )
    return ["work", "N, K", "rank", "apt none (aim)", "apt masks (aim)", *BESIDE], lines


def others(rows):
    lines = []
    for work, ranks in GRAPH.items():
        for rank, (none, masks) in ranks.items():
            for peer, aim in (("apt_linear, no masks", none), ("apt masks", masks)):
                what = f"4096 x 768 x 768 in a CUDA {work.replace('+', ' + ')}, rank {rank}: {peer}"
                lines.append([what, _aimed(_ratio(rows, work=work, rank=rank, peer=peer), aim)])
    lines += [[what, _aimed(_ratio(rows, work=work, peer=peer), aim)] for what, work, peer, aim in OTHERS]
    for width in WIDTHS:
        for work, side in (("odd in", "K"), ("odd out", "N")):
            lines.append([f"{side} {width} over the next multiple of 8", _aimed(_ratio(rows, work=work, peer="odd", **{side: width}), 1.3)])
    return ["work", "measured (aim)"], lines


def kept(rows):
    peers = ("compact", "compact in and out", "library, kept widths", "apt masks", "naive eager, masks")
    lines = []
    for what, work, *aims in KEPT:
        case = {"work": work, "M": 8192}
        cells = [_aimed(_ratio(rows, **case, peer=peer), aim) for peer, aim in zip(peers, (*aims, None, None, None), strict=True)]
        lines.append([what, *cells])
    return ["kept of 4096 x 4096, M 8192, rank 16", "compact (aim)", "compact in and out (aim)", *peers[2:]], lines
