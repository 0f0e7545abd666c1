"""How the page looks: light and dark as the reader's system is, and light on paper.

Series differ by colour and by dash, so that no chart needs colour. The colours are told apart by people who
see red and green alike (after Okabe and Ito), and stand out from the background by 3 to 1 at least, text by
4.5 to 1.
"""

from __future__ import annotations

import re

_LIGHT = """
  --back: #ffffff; --panel: #f6f7f9; --text: #1a1d21; --muted: #5a6270; --rule: #d5d9e0;
  --series1: #0068a8; --series2: #b84e00; --series3: #007a58; --series4: #8a3f9c;
  --good: #006b4c; --bad: #b3261e; --bad-back: #fdeceb; --warn: #7a5200; --warn-back: #fff4dc;
"""
_DARK = """
  --back: #14171b; --panel: #1d2126; --text: #e6e9ed; --muted: #a3acb8; --rule: #3a414b;
  --series1: #62b5ea; --series2: #f0a040; --series3: #3fcb9b; --series4: #d894d8;
  --good: #56d3a5; --bad: #ff9089; --bad-back: #3b1d1c; --warn: #f0c36a; --warn-back: #362b14;
"""

STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .5rem; }}
p, ul {{ margin: .5rem 0; overflow-wrap: anywhere; }}
.muted {{ color: var(--muted); }}
.number {{ white-space: nowrap; }}
.best {{ color: var(--good); font-weight: 600; }}
.note {{ border-left: .25rem solid var(--warn); background: var(--warn-back); padding: .5rem .75rem; }}
.error {{ border-left: .25rem solid var(--bad); background: var(--bad-back); padding: .5rem .75rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--rule); min-width: 4.5rem; max-width: 34rem; overflow-wrap: anywhere; }}
th {{ font-weight: 500; color: var(--muted); min-width: 4rem; overflow-wrap: break-word; }}
pre {{ background: var(--panel); border: 1px solid var(--rule); border-radius: .25rem; padding: .6rem .75rem;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
.charts {{ display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
figure {{ margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--rule);
  border-radius: .25rem; break-inside: avoid; }}
figcaption {{ font-weight: 600; font-size: .9rem; }}
.settings {{ columns: 20rem; column-gap: 2rem; }}
.settings section {{ break-inside: avoid; padding-bottom: .75rem; }}
.settings h4 {{ margin: 0; font-size: .9rem; }}
.settings td {{ width: 100%; }}
footer {{ margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .5rem; font-size: .85rem; }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
svg text {{ fill: var(--muted); font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
svg text.value, svg text.name {{ fill: var(--text); }}
svg text.bad {{ fill: var(--bad); font-weight: 700; }}
svg .grid {{ stroke: var(--rule); stroke-width: 1; }}
svg .line {{ fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }}
svg .series1 {{ stroke: var(--series1); }} svg .series2 {{ stroke: var(--series2); }}
svg .series3 {{ stroke: var(--series3); }} svg .series4 {{ stroke: var(--series4); }}
svg .fill1 {{ fill: var(--series1); }} svg .fill2 {{ fill: var(--series2); }}
svg .fill3 {{ fill: var(--series3); }} svg .fill4 {{ fill: var(--series4); }}
@media print {{
  @page {{ margin: 15mm; }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  h2, h3 {{ break-after: avoid; }}
  tr {{ break-inside: avoid; }}
  .run + .run {{ break-before: page; }}
  .charts {{ grid-template-columns: 1fr 1fr; }}
  figure, .note, .error, pre {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""


def picture_style() -> str:
    """The rules of the charts for a picture that is a file of its own: light, and in colours that need no
    variable, which not every program that draws SVG knows."""
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", _LIGHT))
    rules = [rule for rule in STYLE.splitlines() if rule.startswith(("svg text", "svg ."))]
    rules.append("svg text.title { font-weight: 600; font-size: 14px; }")
    return re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], "\n".join(rules))


def background() -> str:
    """The colour behind such a picture."""
    return re.findall(r"--back: (#\w+);", _LIGHT)[0]
