"""`smooth --dry-run`: what a run would change and take, from the first site that it decides."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quantkit import console
from quantkit.checkpoint.step import Target, peak_memory
from quantkit.model.sites import Site
from quantkit.transforms.decide import Decision
from quantkit.transforms.observe import Observed
from quantkit.transforms.smooth import Run, SmoothOptions, opened


class _Trial(Run):
    """Decides like a run and keeps nothing."""

    def _keep(self, key: str, decision: Decision, observed: Observed | None) -> None:
        pass

    def _kept(self, key: str) -> Decision | None:
        return None


def preview(
    checkpoint: str | Path | None, options: SmoothOptions, target: Target
) -> tuple[dict[str, Any], str]:
    """Sites, time and memory: JSON and text. Raises what `smooth` would before its first site."""
    setting = opened(checkpoint, options, target)
    layout = setting.layout
    sites = [site for site in layout.sites if site.kind in options.sites]
    trial = _Trial(setting.source, None, layout, options, setting.statistics, setting.device)
    trial.sites = sites[:1]
    started = time.perf_counter()
    trial.decisions(setting.tokens)
    seconds = time.perf_counter() - started
    # the first site's share of all work: its weights of theirs, in blocks that the text passes
    seconds *= sum(map(_weights, sites)) / _weights(sites[0])
    wide = max(site.width for site in sites)
    seen = setting.tokens.ids.numel() if setting.tokens else 0
    states = 2 * seen * (layout.hidden + sum(s.width for s in layout.layer_sites(0)) + 2 * wide)
    found: dict[str, Any] = {
        "output": str(setting.output),
        "sites": len(sites),
        "data": setting.tokens.description if setting.tokens else None,
        "unmatched": list(layout.unmatched),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory() + states,
    }
    rows = [(kind, sum(site.kind == kind for site in sites)) for kind in options.sites]
    text = (
        f"{console.table(('site', 'number'), rows)}\nscales by {options.method.name}; "
        f"about {seconds:.0f} s and {found['peak_memory_bytes'] / 1e9:.2f} GB of memory\n"
        f"would write {setting.output}"
    )
    return found, text


def _weights(site: Site) -> int:
    return sum(out * width for out, width in (linear.shape for linear in site.linears))
