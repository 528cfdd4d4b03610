"use strict";
// Draws what the page's JSON tells: lines by uPlot, matrices as SVG. Colours come from the style
// sheet, so that both follow the reader's scheme.

const told = JSON.parse(document.getElementById("told").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(size >= 1000 ? 4 : 3)));
}

// ---- lines ---------------------------------------------------------------------------------

const WHOLE = [1, 2, 5].flatMap((digit) => [1, 10, 100, 1e3, 1e4].map((power) => digit * power)).sort((a, b) => a - b);

function decade(value) {
  if (value === null || Math.abs(Math.log10(value) % 1) > 1e-6) return "";
  return value >= 1e5 || value < 1e-2 ? `1e${Math.round(Math.log10(value))}` : String(value);
}

function decades(least, most) {
  const low = Math.floor(Math.log10(least) + 1e-9), high = Math.ceil(Math.log10(most) - 1e-9);
  return [10 ** low, 10 ** Math.max(high, low + 1)];
}

function nameLines(chart, lines) {
  // beside the last point of each line, moved apart where they would lie on each other
  const { ctx, bbox } = chart, ratio = devicePixelRatio || 1, step = 14 * ratio;
  const places = lines.map((line) => {
    const last = line.y.filter((value) => value !== null).at(-1);
    return { line, at: chart.valToPos(last, "y", true), colour: colour(line.of) };
  }).sort((a, b) => a.at - b.at);
  const floor = bbox.top + bbox.height;
  places.forEach((place, k) => { if (k) place.at = Math.max(place.at, places[k - 1].at + step); });
  for (let k = places.length - 1, limit = floor; k >= 0; k--, limit -= step) {
    places[k].at = Math.min(places[k].at, limit);
  }
  ctx.save();
  ctx.font = `600 ${12 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  for (const place of places) {
    ctx.fillStyle = place.colour;
    ctx.fillText(place.line.name, bbox.left + bbox.width + 6 * ratio, place.at);
  }
  ctx.restore();
}

function draw(box, spec) {
  const font = "12px system-ui, sans-serif", grid = { stroke: colour("line"), width: 1 };
  const axis = { stroke: colour("soft"), font, labelFont: font, grid, ticks: grid };
  const longest = Math.max(...spec.lines.map((line) => line.name.length));
  const options = {
    width: box.clientWidth,
    height: 270,
    padding: [10, 14 + 7.2 * longest, 0, 0],
    cursor: { y: false, drag: { x: true, y: false } },
    scales: {
      x: { time: false },
      y: spec.log ? { distr: 3, range: (_, least, most) => decades(least, most) } : {},
    },
    axes: [
      { ...axis, label: spec.across, labelSize: 20, size: 34, incrs: WHOLE },
      {
        ...axis,
        size: 56,
        grid: { ...grid, filter: (_, splits) => splits.map((v) => (spec.log && !decade(v) ? null : v)) },
        ticks: { ...grid, show: false },
        values: (_, splits) => splits.map(spec.log ? decade : short),
      },
    ],
    series: [
      { label: spec.across },
      ...spec.lines.map((line) => ({
        label: line.name,
        stroke: colour(line.of),
        width: 2,
        dash: line.dashed ? [6, 4] : undefined,
        points: { show: false },
        value: (_, value) => short(value),
      })),
    ],
    hooks: { draw: [(chart) => nameLines(chart, spec.lines)] },
  };
  return new uPlot(options, [spec.x, ...spec.lines.map((line) => line.y)], box);
}

// ---- matrices ------------------------------------------------------------------------------

function matrix(numbers, most, title) {
  const n = Math.sqrt(numbers.length);
  const cells = numbers.map((value, k) => {
    const strength = Math.min(1, Math.abs(value ?? 0) / most).toFixed(3);
    const where = `x="${k % n}" y="${Math.floor(k / n)}" width="1" height="1"`;
    return `<rect ${where} fill-opacity="${strength}"${value < 0 ? ' class="negative"' : ""}/>`;
  });
  return `<svg viewBox="0 0 ${n} ${n}" role="img"><title>${title}</title>${cells.join("")}</svg>`;
}

function fill(strip) {
  const one = told.variants[strip.dataset.of], kind = strip.dataset.kind;
  const gains = kind === "h_res" ? one.layer_forward : one.gain_forward;
  strip.innerHTML = one[kind].map((numbers, layer) => {
    const most = Math.max(1, ...numbers.map((value) => Math.abs(value ?? 0)));
    const rows = numbers.map(short).join(" ");
    const title = `layer ${layer + 1}, gain ${short(gains[layer])}: ${rows}`;
    return `<div>${matrix(numbers, most, title)}${layer + 1}<br>×${short(gains[layer])}</div>`;
  }).join("");
}

// ---- the page ------------------------------------------------------------------------------

let charts = [];

function drawAll() {
  charts.forEach((chart) => chart.destroy());
  charts = [...document.querySelectorAll(".plot")].map((box) => draw(box, told.charts[box.dataset.chart]));
}

function fit() {
  for (const chart of charts) {
    const width = chart.root.parentElement.clientWidth;
    if (width !== chart.width) chart.setSize({ width, height: chart.height });
  }
}

document.querySelectorAll(".heat").forEach(fill);
drawAll();
dark.addEventListener("change", drawAll);
addEventListener("resize", fit);
