"""FLAP (arXiv 2312.11983) written plainly: input features of o_proj and down_proj are scored by their variance on the
calibration text times the squared norm of their column of the weight, standardised in each sublayer; heads have the mean score
of their features. Units are ranked over the whole model, and what goes is replaced by its mean."""

import torch

from common import Walk, arguments, clock, load, report, watch, windows


class Moments:
    """Mean and variance of each feature, in f64."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def see(self, x):
        x = x.double()
        self.count += x.shape[0]
        self.sum = self.sum + x.sum(0)
        self.squares = self.squares + (x * x).sum(0)

    def mean(self):
        return self.sum / self.count

    def variance(self):
        return self.squares / self.count - self.mean() ** 2


def standard(scores):
    return (scores - scores.mean()) / scores.std()


def main():
    flags = arguments(ratio=0.25)
    model, tokens = load(flags.model), windows(flags.model, flags.calib, flags.window)
    seconds = clock()
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    walk, units, moments, order, total = Walk(model, tokens), [], [], {}, 0
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            seen = {}
            for name, linear in (("o", block.self_attn.o_proj), ("down", block.mlp.down_proj)):
                seen[name] = Moments()
                watch(linear, seen[name].see)
            walk.through(block)
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear._forward_pre_hooks.clear()
            moments.append(seen)
            # The unit of attention is a key/value head with its query heads where there are four or more of these, else one
            # query head of each group, the lowest ones first; of the MLP a neuron.
            parts = groups if groups >= 4 else heads // groups
            attention, mlp = block.self_attn, block.mlp
            whole = sum(w.weight.numel() for w in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj))
            size = whole if groups >= 4 else attention.q_proj.weight.numel() + attention.o_proj.weight.numel()
            total += whole + 3 * mlp.down_proj.weight.numel()
            width = attention.o_proj.weight.shape[1] // heads
            for kind, linear, count, cost in (
                ("o", attention.o_proj, parts, size // parts),
                ("down", mlp.down_proj, mlp.down_proj.weight.shape[1], 3 * mlp.down_proj.weight.shape[0]),
            ):
                score = standard(seen[kind].variance() * linear.weight.double().pow(2).sum(0))
                if kind == "o":
                    grid = score.reshape(groups, heads // groups, width).mean(2)
                    ranked, order[number] = grid.sort(dim=1)
                    score = grid.mean(1) if groups >= 4 else ranked.mean(0)
                units += [(value.item(), cost, number, kind, unit) for unit, value in enumerate(score)]
        budget, gone = flags.ratio * total, {}
        left = {}
        for _, _, number, kind, _ in units:
            left[number, kind] = left.get((number, kind), 0) + 1
        for _, cost, number, kind, unit in sorted(units):
            if cost <= budget and left[number, kind] > 1:
                budget -= cost
                left[number, kind] -= 1
                gone.setdefault((number, kind), []).append(unit)
        for (number, kind), chosen in gone.items():
            block = model.model.layers[number]
            linear = block.self_attn.o_proj if kind == "o" else block.mlp.down_proj
            columns = torch.arange(linear.weight.shape[1])
            if kind == "o":
                grid = columns.reshape(groups, heads // groups, -1)
                if groups >= 4:
                    columns = grid[chosen].flatten()
                else:
                    columns = torch.cat([grid[group, order[number][group, chosen]].flatten() for group in range(groups)])
            else:
                columns = columns[chosen]
            mean = moments[number][kind].mean()[columns]
            bias = (linear.weight.double()[:, columns] @ mean).float()
            linear.bias = torch.nn.Parameter(bias if linear.bias is None else linear.bias + bias, requires_grad=False)
            linear.weight[:, columns] = 0
        report(model, flags, seconds(), ratio=flags.ratio)


if __name__ == "__main__":
    main()
