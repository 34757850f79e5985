"""What an audit found, in sentences."""

from typing import Any

__all__ = ["describe_audit", "tell_split"]


def describe_audit(report: dict[str, Any]) -> str:
    """Return what is printed after an audit.

    Parameters
    ----------
    report : dict
        What `audit.auditing.audit` returns.
    """
    lines = [
        f"{report['candidates']} candidates ({report['clusters']} clusters), "
        f"{report['held_out']} held-out samples, "
        + (f"reference {report['reference']}" if report["reference"] else "no reference")
    ]
    width = max(len(one["name"]) for one in report["checkpoints"])
    lines += ["", f"{'':<{width}}  memorization  95 % interval       p       AUC  memorized"]
    for one in report["checkpoints"]:
        mean = one["estimates"]["memorization"]
        lines.append(
            f"{one['name']:<{width}}  {mean['mean']:+12.4f}  {mean['low']:+.4f} to "
            f"{mean['high']:+.4f}  {mean['p_value']:<7.2g} {one['auc']:.3f}  "
            f"{one['memorized']:8.1%}"
        )
    last = report["checkpoints"][-1]
    lines += [""]
    for kind, parts in last["split"].items():
        for name, part in parts.items():
            mean = part["memorization"]
            told = f"{mean['mean']:+.4f} ± {mean['stderr']:.4f}" if mean else "too few"
            lines.append(f"{kind:<20}{name:<18}{part['samples']:>8}  {told}")
    lines += tell_split(last)
    if last["recall"]:
        found = last["recall"]
        lines.append(
            f"Deja vu against the {found['against']} (k = {found['k']}): PPG {found['ppg']:+.3f}, "
            f"PRG {found['prg']:+.3f}; held-out captions {found['ppg_held_out']:+.3f}, "
            f"{found['prg_held_out']:+.3f}"
        )
    warnings = [*report["warnings"], *(w for one in report["checkpoints"] for w in one["warnings"])]
    return "\n".join([*lines, *(f"Warning: {line}" for line in dict.fromkeys(warnings))])


def tell_split(result: dict[str, Any]) -> list[str]:
    """Say whether the rare or the wrong is memorized, where that is known."""
    parts = result["split"].get("rarity and verdict", {})
    means = {name: part["memorization"] for name, part in parts.items()}
    base = means.get("common and right")
    if base is None:
        return []
    more = []
    for name, told in (("rare and right", "the rare"), ("common and wrong", "the wrong")):
        one = means.get(name)
        if one is None:
            continue
        error = (one["stderr"] ** 2 + base["stderr"] ** 2) ** 0.5
        if one["mean"] - base["mean"] > 2 * error:
            more.append((one["mean"] - base["mean"], told))
    if not more:
        return ["Neither the rare nor the wrong is memorized more than the common and right."]
    told = " and ".join(f"{name} by {excess:.3f}" for excess, name in sorted(more, reverse=True))
    return [f"Memorized more than the common and right: {told}."]
