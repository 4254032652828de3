"use strict";
// The timeline: one row for each slot, drawn on a canvas that is as high as what can be seen of it.
(() => {
  const canvas = document.getElementById("canvas");
  if (!canvas) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const view = document.getElementById("timeline"), space = document.getElementById("space");
  const hover = document.getElementById("hover"), spoken = document.getElementById("spoken");
  const isFailure = (kind) => data.failed.includes(kind & 15);
  const HEAD = 20, AXIS = 24, COLOURS = 8, MAX_HEIGHT = 560, MAX_PRINTED_HEIGHT = 780;

  const print = matchMedia("print"), narrow = matchMedia("screen and (max-width: 700px)");

  // ---- decode: see bars.py
  const text = atob(data.bars), count = data.rows.flat().reduce((a, b) => a + b, 0);
  const starts = new Float64Array(count), ends = new Float64Array(count), kinds = new Uint32Array(count);
  const tasks = new Uint32Array(count).fill(1), calls = new Uint32Array(count).fill(1);
  const sent = data.sizes ? new Float64Array(count) : null, received = data.sizes ? new Float64Array(count) : null;
  let at = 0;
  const number = () => {
    let value = 0, factor = 1, byte;
    do { byte = text.charCodeAt(at++); value += (byte & 127) * factor; factor *= 128; } while (byte > 127);
    return value;
  };
  const rows = [];       // {node, slot, from, to}: the bars of a row are those from `from` to before `to`
  const failures = [];   // the bars of failures, in the order of time
  let next = 0;
  data.rows.forEach((counts, node) => counts.forEach((bars, slot) => {
    rows.push({node, slot, from: next, to: next + bars});
    let tick = 0;
    for (const last = next + bars; next < last; next++) {
      tick += number(); starts[next] = tick * data.tick;
      tick += number(); ends[next] = tick * data.tick;
      const kind = number(); kinds[next] = kind >> 1;
      if (kind & 1) { tasks[next] = number(); calls[next] = number(); }
      if (sent) { sent[next] = number(); received[next] = number(); }
      if (isFailure(kinds[next])) failures.push({bar: next, row: rows.length - 1});
    }
  }));
  failures.sort((a, b) => starts[a.bar] - starts[b.bar]);

  // ---- where the rows are, from the top
  let usual, heads, height;   // a row's height; {node, y} of each node's name; the height of all
  const placeRows = (thick) => {
    usual = thick; heads = []; height = 4;
    rows.forEach((row, index) => {
      if (!index || rows[index - 1].node !== row.node) { heads.push({node: row.node, y: height}); height += HEAD; }
      row.y = height; height += usual;
      if (index + 1 === rows.length || rows[index + 1].node !== row.node) height += 4;
    });
  };
  // What can be scrolled has rows that can be told apart; on paper, all of them have to be on one page.
  const arrange = () => {
    if (!print.matches) placeRows(rows.length <= 24 ? 16 : rows.length <= 120 ? 10 : rows.length <= 600 ? 5 : 3);
    else for (const thick of [16, 10, 5, 3, 2, 1]) { placeRows(thick); if (height + AXIS <= MAX_PRINTED_HEIGHT) break; }
  };

  let LEFT = 64, RIGHT = 1000;   // of the time's axis, in pixels: where charts.py has them
  let left = 0, right = data.length || 1, width = 0, visible = 0, colours = null, failure = -1, chosen = -1, asked = false;
  const least = Math.max(data.tick * 20, data.length / 1e6);
  const x = (seconds) => LEFT + (seconds - left) / (right - left) * (RIGHT - LEFT);
  const time = (px) => left + (px - LEFT) / (RIGHT - LEFT) * (right - left);

  const shown = (seconds) => {
    const digits = (value) => value.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
    if (seconds < 0.001) return digits(seconds * 1e6) + " µs";
    if (seconds < 1) return digits(seconds * 1e3) + " ms";
    if (seconds < 60) return seconds.toFixed(seconds < 10 ? 2 : 1) + " s";
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
    return `${Math.floor(seconds / 3600)} h ${String(Math.floor(seconds % 3600 / 60)).padStart(2, "0")} min`;
  };
  const bytes = (value) => {
    const units = ["bytes", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (value >= 1000 && unit < 4) { value /= 1000; unit++; }
    return (unit ? value.toPrecision(3) : value) + " " + units[unit];
  };
  const mark = (seconds, step) => {
    if (seconds < 60 || step < 1) return seconds.toFixed(step < 1 ? Math.min(6, Math.ceil(-Math.log10(step) - 1e-9)) : 0) + " s";
    const pad = (value) => String(value).padStart(2, "0"), whole = Math.round(seconds);
    const hours = Math.floor(whole / 3600), minutes = Math.floor(whole % 3600 / 60);
    return hours ? `${hours}:${pad(minutes)}:${pad(whole % 60)}` : `${minutes}:${pad(whole % 60)}`;
  };
  const describe = (bar, row) => {
    const several = tasks[bar] > 1, batch = calls[bar] > tasks[bar];
    const outcome = data.outcomes[kinds[bar] & 15] ?? "";
    const lines = [data.names[kinds[bar] >> 4] + (several ? `, ${tasks[bar]} tasks beside each other` : "")];
    lines.push(shown(ends[bar] - starts[bar]) + (batch ? ` for ${calls[bar]} calls` : "") + (outcome ? ": " + outcome : ""));
    lines.push(`${data.nodes[row.node]}, slot ${row.slot}, began after ${shown(starts[bar])}`);
    if (sent) lines.push(`sent ${bytes(sent[bar])}, received ${bytes(received[bar])}`);
    return lines.join("\n");
  };

  // ---- drawing
  const style = () => {
    const own = getComputedStyle(document.documentElement);
    const value = (name) => own.getPropertyValue("--" + name).trim();
    colours = {back: value("back"), line: value("line"), text: value("text"), faint: value("faint"), ready: value("ready"),
      fail: value("fail"), bars: Array.from({length: COLOURS}, (_, index) => value("f" + index))};
  };
  const axisStep = () => {
    const rough = (right - left) / Math.max(2, (RIGHT - LEFT) / 110);
    if (rough <= 1) { const power = 10 ** Math.floor(Math.log10(rough)); return power * [1, 2, 5, 10].find((f) => power * f >= rough * 0.999999); }
    return [2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400].find((step) => step >= rough) ?? Math.ceil(rough / 86400) * 86400;
  };
  const firstAfter = (row, seconds) => {   // the first bar of a row that ends after this time
    let low = row.from, high = row.to;
    while (low < high) { const middle = (low + high) >> 1; if (ends[middle] <= seconds) low = middle + 1; else high = middle; }
    return low;
  };
  const drawRow = (context, row, y, thickness) => {
    let pixel = -1, cover = 0, colour = 0;   // what bars narrower than a pixel cover of a column
    const flush = () => {
      if (cover <= 0) return;
      context.globalAlpha = Math.min(1, Math.max(0.2, cover));
      context.fillStyle = colours.bars[colour];
      context.fillRect(pixel, y, 1, thickness);
      context.globalAlpha = 1; cover = 0;
    };
    const failed = [];
    for (let bar = firstAfter(row, left); bar < row.to && starts[bar] < right; bar++) {
      const from = Math.max(LEFT, x(starts[bar])), to = Math.min(RIGHT, x(ends[bar]));
      if (isFailure(kinds[bar])) { failed.push([from, Math.max(to, from + (thickness > 3 ? 5 : 2.5))]); continue; }
      if (to - from >= 1.5) {
        flush();
        context.fillStyle = colours.bars[(kinds[bar] >> 4) % COLOURS];
        context.fillRect(from, y, to - from > 5 ? to - from - 1 : to - from, thickness);
      } else {
        if (Math.floor(from) !== pixel) { flush(); pixel = Math.floor(from); colour = (kinds[bar] >> 4) % COLOURS; }
        cover += to - from;
      }
    }
    flush();
    for (const [from, to] of failed) {   // also told by shape: with an edge
      context.fillStyle = colours.fail; context.fillRect(from, y, to - from, thickness);
      if (thickness > 3) { context.strokeStyle = colours.text; context.lineWidth = 1; context.strokeRect(from + 0.5, y + 0.5, Math.max(1, to - from - 1), thickness - 1); }
    }
  };
  const draw = () => {
    asked = false;
    const ratio = window.devicePixelRatio || 1, top = view.scrollTop;
    const rect = [Math.round(width * ratio), Math.round(visible * ratio)];
    if (canvas.width !== rect[0] || canvas.height !== rect[1]) { canvas.width = rect[0]; canvas.height = rect[1]; }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = colours.back; context.fillRect(0, 0, width, visible);
    const bottom = visible - AXIS, thickness = usual > 4 ? usual - 2 : Math.max(1, usual - 1);
    context.font = "12px system-ui, 'DejaVu Sans', sans-serif"; context.textBaseline = "middle";
    context.save(); context.beginPath(); context.rect(0, 0, width, bottom); context.clip();
    for (const row of rows) {
      const y = row.y - top;
      if (y > bottom || y + usual < 0) continue;
      context.fillStyle = colours.ready;
      for (const [node, from, to] of data.ready) {
        if (node === row.node && to > left && from < right) {
          context.fillRect(Math.max(LEFT, x(from)), y, Math.min(RIGHT, x(to)) - Math.max(LEFT, x(from)), thickness);
        }
      }
      drawRow(context, row, y, thickness);
      if (usual >= 10) { context.fillStyle = colours.faint; context.textAlign = "right"; context.font = "10px system-ui, 'DejaVu Sans', sans-serif"; context.fillText(row.slot, LEFT - 8, y + thickness / 2); }
    }
    context.font = "600 12px system-ui, 'DejaVu Sans', sans-serif";
    for (const head of heads) {
      const y = head.y - top;
      if (y > bottom || y + HEAD < 0) continue;
      context.fillStyle = colours.text; context.textAlign = "left";
      context.fillText(`${data.nodes[head.node]}`, 8, y + HEAD / 2, width - 16);
    }
    if (chosen >= 0) {
      const row = rows[chosen], bar = failures[failure].bar, from = Math.max(LEFT, x(starts[bar])), to = Math.min(RIGHT, x(ends[bar]));
      context.strokeStyle = colours.text; context.lineWidth = 2;
      if (to >= LEFT && from <= RIGHT) context.strokeRect(from - 3, row.y - top - 2, Math.max(4, to - from) + 6, thickness + 4);
    }
    context.restore();
    context.fillStyle = colours.back; context.fillRect(0, bottom, width, AXIS);
    context.strokeStyle = colours.line; context.lineWidth = 1; context.beginPath();
    context.moveTo(0, bottom + 0.5); context.lineTo(width, bottom + 0.5);
    const step = axisStep();
    context.fillStyle = colours.faint; context.textAlign = "center"; context.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    for (let count = Math.ceil(left / step - 1e-9); count * step <= right * (1 + 1e-12); count++) {
      const px = x(count * step);
      context.moveTo(Math.round(px) + 0.5, bottom); context.lineTo(Math.round(px) + 0.5, bottom + 5);
      const label = mark(count * step, step), half = context.measureText(label).width / 2;
      context.fillText(label, Math.min(px, width - half - 4), bottom + 14);
    }
    context.stroke();
  };
  const redraw = () => { if (!asked) { asked = true; requestAnimationFrame(draw); } };
  const resize = () => {
    arrange();
    visible = Math.min(height + AXIS, print.matches ? MAX_PRINTED_HEIGHT : MAX_HEIGHT);
    width = view.clientWidth;
    const units = narrow.matches ? 480 : 1100;   // as wide as charts.py draws, so that times are below each other
    LEFT = width * 64 / units; RIGHT = width * (units - 12) / units;
    canvas.style.height = visible + "px";
    space.style.height = height + AXIS - visible + "px";
    redraw();
  };

  // ---- zoom, move, hover, keys
  const show = (from, to) => {
    const all = data.length || 1, length = Math.min(all, Math.max(least, to - from));
    left = Math.min(Math.max(0, from), all - length); right = left + length;
    redraw();
  };
  const zoom = (factor, around) => { show(around - (around - left) * factor, around + (right - around) * factor); };
  const move = (share) => { const by = (right - left) * share; show(left + by, right + by); };
  const place = (event) => { const box = view.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const find = (event) => {
    const [px, py] = place(event), y = py + view.scrollTop;
    if (px < LEFT || px > RIGHT || py > visible - AXIS) return null;
    const row = rows.find((each) => y >= each.y && y < each.y + usual);
    if (!row) return null;
    const near = (right - left) / (RIGHT - LEFT) * 2, seconds = time(px);
    let bar = firstAfter(row, seconds - near), best = -1, away = Infinity;
    for (; bar < row.to && starts[bar] <= seconds + near; bar++) {
      const distance = Math.max(0, starts[bar] - seconds, seconds - ends[bar]) - (isFailure(kinds[bar]) ? near : 0);
      if (distance < away) { best = bar; away = distance; }
    }
    return best < 0 ? null : [best, row];
  };
  let dragged = null;
  view.addEventListener("pointerdown", (event) => {
    if (event.button || event.pointerType === "touch" && !event.isPrimary || event.offsetX >= width) return;
    dragged = {x: event.clientX, y: event.clientY, left, right, top: view.scrollTop};
    view.setPointerCapture(event.pointerId); view.classList.add("moving"); hover.hidden = true;
  });
  view.addEventListener("pointermove", (event) => {
    if (dragged) {
      const by = (event.clientX - dragged.x) / (RIGHT - LEFT) * (dragged.right - dragged.left);
      show(dragged.left - by, dragged.right - by);
      if (event.pointerType !== "touch") view.scrollTop = dragged.top - (event.clientY - dragged.y);
      return;
    }
    const found = find(event);
    hover.hidden = !found;
    if (!found) return;
    hover.textContent = describe(...found);
    const box = hover.getBoundingClientRect();
    hover.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    hover.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18) + "px";
  });
  const drop = () => { dragged = null; view.classList.remove("moving"); };
  view.addEventListener("pointerup", drop);
  view.addEventListener("pointercancel", drop);
  view.addEventListener("pointerleave", () => { hover.hidden = true; });
  view.addEventListener("wheel", (event) => {
    const focused = document.activeElement === view, sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (sideways) { event.preventDefault(); move((event.deltaX || event.deltaY) / (RIGHT - LEFT)); }
    else if (event.ctrlKey || event.metaKey || focused) {
      event.preventDefault(); hover.hidden = true;
      zoom(Math.exp(Math.max(-100, Math.min(100, event.deltaY * (event.deltaMode ? 30 : 1))) / 250), time(Math.max(LEFT, place(event)[0])));
    }
  }, {passive: false});
  view.addEventListener("dblclick", () => show(0, data.length));
  view.addEventListener("scroll", redraw);
  const toFailure = (by) => {
    if (!failures.length) { spoken.textContent = "No task failed."; return; }
    failure = failure < 0 ? (by > 0 ? 0 : failures.length - 1) : (failure + by + failures.length) % failures.length;
    const {bar, row} = failures[failure], half = (right - left) / 2, middle = (starts[bar] + ends[bar]) / 2;
    chosen = row;
    if (starts[bar] < left || ends[bar] > right) show(middle - half, middle + half);
    view.scrollTop = Math.max(0, rows[row].y - visible / 2);
    spoken.textContent = `Failure ${failure + 1} of ${failures.length}: ` + describe(bar, rows[row]).replaceAll("\n", "; ");
    redraw();
  };
  const keys = {
    "+": () => zoom(0.6, (left + right) / 2), "=": () => zoom(0.6, (left + right) / 2), "-": () => zoom(1 / 0.6, (left + right) / 2),
    "ArrowLeft": () => move(-0.2), "ArrowRight": () => move(0.2), "ArrowUp": () => { view.scrollTop -= 60; },
    "ArrowDown": () => { view.scrollTop += 60; }, "0": () => show(0, data.length), "n": () => toFailure(1), "p": () => toFailure(-1),
  };
  view.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault(); keys[event.key]();
  });
  document.getElementById("in").addEventListener("click", keys["+"]);
  document.getElementById("out").addEventListener("click", keys["-"]);
  document.getElementById("fit").addEventListener("click", keys["0"]);

  // ---- what the colours mean
  const item = (key, words) => {
    const entry = document.createElement("li"), box = document.createElement("span");
    box.className = "key " + key; entry.append(box, words);
    document.getElementById("legend").append(entry);
  };
  data.names.slice(0, COLOURS).forEach((name, index) => item("k" + index, name));
  if (data.names.length > COLOURS) item("k0", `${data.names.length - COLOURS} more functions, in the same colours again`);
  if (failures.length) item("kf", "failed");

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { style(); redraw(); });
  addEventListener("resize", resize);
  print.addEventListener("change", () => { style(); resize(); if (print.matches) draw(); });
  style(); resize(); draw();
})();
