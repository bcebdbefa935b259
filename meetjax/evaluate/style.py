"""The style sheet of a report: one column that fits a phone, light and dark, no font or file from elsewhere."""

# The first four kind colours keep an OKLab distance of at least 0.12 under protanopia, deuteranopia and tritanopia
# (Machado et al., 2009) and a contrast of at least 4 to the page.
CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --ink: #1a1d21; --muted: #646b75; --grid: #e3e6ea; --band: #f1f3f6; --rule: #d5d9df;
  --kind0: #16348f; --kind1: #8a3200; --kind2: #0f8f55; --kind3: #a84fb0; --kind4: #6b6400; --kind5: #555b64;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181c; --card: #1e2126; --ink: #e8eaed; --muted: #9aa1ab; --grid: #2c3037; --band: #1f2329; --rule: #383d45;
    --kind0: #2f8cf0; --kind1: #e0733f; --kind2: #3fe080; --kind3: #f5b0ec; --kind4: #d9c54a; --kind5: #b8bcc4;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; letter-spacing: -0.01em; margin: 2.8rem 0 0.5rem; }
p { max-width: 44rem; margin: 0.5rem 0; }
.muted, figcaption, .note { color: var(--muted); }
.note, figcaption { font-size: 0.86rem; line-height: 1.45; }
code { font: 0.86rem/1.5 var(--mono); overflow-wrap: anywhere; }
pre { background: var(--card); padding: 0.7rem 0.9rem; border-radius: 6px; margin: 0.6rem 0; white-space: pre-wrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.9rem 1.6rem; margin: 1.6rem 0 0; }
.facts dt { color: var(--muted); font-size: 0.82rem; }
.facts dd { margin: 0; font-size: 1.35rem; font-weight: 600; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1.4rem 1.6rem; margin-top: 1rem; }
.plots.single { grid-template-columns: minmax(0, 27rem); }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; font-family: var(--font); stroke-linejoin: round; }
figcaption { margin-top: 0.35rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; margin-top: 0.8rem; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 0.82rem; color: var(--muted); vertical-align: bottom; }
th, td { padding: 0.42rem 1.1rem 0.42rem 0; border-bottom: 1px solid var(--rule); }
th.number, td.number { text-align: right; white-space: nowrap; }
tr.reference td { color: var(--muted); }
.kind { font-weight: 700; white-space: nowrap; }
.interval { display: inline-block; width: 7.5rem; vertical-align: middle; }
.bar { display: inline-block; height: 0.55rem; background: var(--kind0); border-radius: 2px; vertical-align: middle; }
.wide { min-width: 8rem; width: 40%; }
details { border-bottom: 1px solid var(--rule); padding: 0.7rem 0; }
summary { cursor: pointer; font-weight: 600; }
.answers table { table-layout: fixed; }
.answers th.kind, .answers td.kind { width: 5.6rem; position: sticky; left: 0; background: var(--page); padding-right: 0.6rem; }
.answers td { vertical-align: top; font-size: 0.86rem; line-height: 1.45; overflow-wrap: anywhere; }
.answers th.answer, .answers td.answer { width: 14.5rem; padding-right: 1.2rem; }
.answers .text { white-space: pre-wrap; }
.answers .words { color: var(--muted); font-size: 0.78rem; }
@media print { details:not([open]) > * { display: block; } .scroll { overflow: visible; } }
"""
