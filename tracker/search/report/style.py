"""How the study page looks: its template, and what its charts have in common."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'

COLOURS = {
    "ink": "#1b1f26",
    "line": "#dfe2e7",
    "faint": "#b9bfc9",
    "first": "#2767b5",
    "second": "#c2570c",
    "pale": "#c6dbef",
    "deep": "#08306b",
}

STATE_COLOURS = {
    "complete": "#2767b5",
    "pruned": "#e09a3e",
    "failed": "#c0262d",
    "running": "#3c9a5f",
    "broken": "#b9bfc9",
}

BODY = {
    "font": {"family": FONT, "size": 12, "color": COLOURS["ink"]},
    "paper_bgcolor": "#fff",
    "plot_bgcolor": "#fff",
    "margin": {"l": 50, "r": 20, "t": 30, "b": 45},
    "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
    "hoverlabel": {"align": "left", "font": {"size": 11}},
}
"""Of every chart's layout."""

AXIS = {
    "automargin": True,
    "gridcolor": COLOURS["line"],
    "linecolor": COLOURS["line"],
    "zeroline": False,
}
"""Of every axis."""

# One light scheme: optuna's scales of blue end in white and in navy.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
img-src data: blob:">
<link rel="icon" href="data:,">
<title>{{title}}</title>
<style>
  *, *::before, *::after { box-sizing: border-box; }
  html { overflow-y: scroll; } /* charts measure the page before it is long */
  body {
    margin: 0; background: #fff; color: #1b1f26;
    font: 13px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
    font-variant-numeric: tabular-nums;
  }
  h1, h2, h3, dl, dd { margin: 0; padding: 0; font: inherit; }
  header {
    display: flex; gap: 4px 12px; align-items: baseline; flex-wrap: wrap; padding: 7px 14px;
    border-bottom: 1px solid #dfe2e7;
  }
  h1 { font-weight: 600; overflow-wrap: anywhere; }
  header p, .note { margin: 0; color: #626b7a; }
  main { max-width: 1100px; padding: 0 14px 24px; }
  section { padding-top: 16px; }
  .chart { overflow: hidden; }
  h2 { padding-bottom: 6px; font-size: 15px; font-weight: 600; }
  h3 { padding-top: 6px; font-weight: 600; }
  dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; }
  dt { color: #626b7a; max-width: 30ch; overflow-wrap: anywhere; }
  dd { overflow-wrap: anywhere; }
  code {
    padding: 1px 5px; border-radius: 4px; background: #f5f6f8;
    font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere;
  }
  .command { white-space: pre-wrap; user-select: all; }
  .command::before { content: "$ "; color: #626b7a; }
  .wide { overflow-x: auto; margin-bottom: 6px; }
  table { border-collapse: collapse; }
  th, td {
    padding: 3px 12px 3px 0; border-bottom: 1px solid #dfe2e7; text-align: left;
    vertical-align: baseline; white-space: nowrap;
  }
  th { color: #626b7a; font-weight: 400; }
  td:last-child { white-space: normal; min-width: 300px; }
</style>
</head>
<body>
<header>
<h1>{{title}}</h1>
<p>Drag in a chart to zoom, double-click to see all of it again.</p>
</header>
<main>
{{sections}}
</main>
<script>{{plotly}}</script>
<script type="application/json" id="figures">{{figures}}</script>
<script>
(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  for (const [number, { data, layout }] of figures.entries()) {
    const config = { responsive: true, displayModeBar: false };
    try {
      await Plotly.newPlot(`chart-${number}`, data, layout, config);
    } catch (error) { // a browser without WebGL, say: the others are drawn
      document.getElementById(`chart-${number}`).textContent = `This chart failed: ${error}`;
    }
    await new Promise((next) => setTimeout(next)); // the page can be read meanwhile
  }
})();
</script>
</body>
</html>
"""
