"use strict";
// The page-state explorer: draws what encoding.py tells it. Nothing is loaded, and nothing is sent.
(async () => {
  const $ = (id) => document.getElementById(id);
  const meta = JSON.parse($("data-meta").textContent);
  const TOTAL = meta.pages;
  const STATES = meta.states;
  const N = STATES.length;
  const PAGE = 4096;
  const times = meta.times;

  // ---- data ------------------------------------------------------------------------------------------------
  async function inflated(id) {
    const text = atob($(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    $(id).textContent = "";
    const inflating = new DecompressionStream("deflate"), writer = inflating.writable.getWriter();
    writer.write(bytes);
    writer.close();
    const parts = [], out = inflating.readable.getReader();
    let size = 0;
    for (let part = await out.read(); !part.done; part = await out.read()) {
      parts.push(part.value);
      size += part.value.length;
    }
    const all = new Uint8Array(size);
    parts.reduce((at, part) => { all.set(part, at); return at + part.length; }, 0);
    return all;
  }

  // Numbers in base 128, the lowest digit first. Products, not shifts: they go beyond 32 bits.
  function reader(bytes) {
    let at = 0;
    return () => {
      let value = 0, weight = 1, digit;
      do {
        digit = bytes[at++];
        value += (digit & 127) * weight;
        weight *= 128;
      } while (digit & 128);
      return value;
    };
  }

  const Places = TOTAL < 2 ** 32 ? Uint32Array : Float64Array;

  // For each snapshot what changed in it: starts, ends and codes. The first one is all of memory.
  function readStates(bytes) {
    const next = reader(bytes), found = [];
    for (let t = 0; t < times.length; t++) {
      const n = next();
      const starts = new Places(n), ends = new Places(n), codes = new Uint32Array(n);
      for (let i = 0, end = 0; i < n; i++) {
        starts[i] = end + next();
        ends[i] = end = starts[i] + next();
        codes[i] = next();
      }
      found.push({ starts, ends, codes });
    }
    return found;
  }

  function readEvents(bytes) {
    const n = meta.events, next = reader(bytes);
    const found = {
      n, operation: new Float64Array(n), kind: new Uint16Array(n), first: new Float64Array(n),
      asked: new Float64Array(n), done: new Float64Array(n),
    };
    for (let i = 0, operation = 0, first = 0; i < n; i++) {
      found.operation[i] = operation += next();
      found.kind[i] = next();
      const zigzag = next();
      found.first[i] = first += zigzag % 2 ? -(zigzag + 1) / 2 : zigzag / 2;
      found.asked[i] = next();
      found.done[i] = next();
    }
    return found;
  }

  const changes = readStates(await inflated("data-states"));
  const events = readEvents(await inflated("data-events"));

  // ---- runs of one snapshot --------------------------------------------------------------------------------
  function place(sorted, value) { // the last place whose value isn't beyond `value`
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  function applied(runs, change) {
    const { starts, codes } = runs, n = starts.length, m = change.starts.length;
    if (!m) return runs;
    const to = new Places(n + 2 * m), with_ = new Uint32Array(n + 2 * m);
    let size = 0;
    const put = (start, code) => {
      if (size && to[size - 1] === start) size--;
      if (size && with_[size - 1] === code) return;
      to[size] = start;
      with_[size++] = code;
    };
    let i = 0;
    for (let j = 0; j < m; j++) {
      const low = change.starts[j], high = change.ends[j];
      while (i < n && starts[i] < low) put(starts[i], codes[i++]);
      put(low, change.codes[j]);
      while (i < n && starts[i] < high) i++;
      if (high < TOTAL && !(i < n && starts[i] === high)) put(high, codes[i - 1]);
    }
    while (i < n) put(starts[i], codes[i++]);
    return { starts: to.slice(0, size), codes: with_.slice(0, size) };
  }

  const KEPT = 3e6; // runs of all snapshots that are kept
  const cache = new Map([[0, { starts: changes[0].starts, codes: changes[0].codes }]]);
  function runsAt(t) {
    if (cache.has(t)) return cache.get(t);
    let from = t;
    while (!cache.has(from)) from--;
    let runs = cache.get(from);
    for (let k = from + 1; k <= t; k++) runs = applied(runs, changes[k]);
    let kept = runs.starts.length;
    for (const [k, one] of cache) {
      kept += one.starts.length;
      if (kept > KEPT && k) cache.delete(k);
    }
    cache.set(t, runs);
    return runs;
  }

  // The code of one position in every snapshot.
  function codesOf(position) {
    const found = new Uint32Array(times.length);
    for (let t = 0; t < times.length; t++) {
      const { starts, ends, codes } = changes[t], at = place(starts, position);
      found[t] = at >= 0 && position < ends[at] ? codes[at] : t ? found[t - 1] : meta.palette.length - 1;
    }
    return found;
  }

  // ---- what a code stands for ------------------------------------------------------------------------------
  const shares = new Float32Array(meta.palette.length * N);
  const sides = new Uint8Array(meta.palette.length); // 0 shared, 1 private, 2 both, 3 nothing
  meta.palette.forEach((one, code) => {
    if (one === null) {
      sides[code] = 3;
    } else if (typeof one === "number") {
      shares[code * N + meta.state_of[one]] = 1;
      sides[code] = one & 1;
    } else {
      one.forEach((share, state) => { shares[code * N + state] = share; });
      const isPrivate = one.some((share, state) => share && meta.private[state] === 1);
      const isShared = one.some((share, state) => share && meta.private[state] === 0);
      sides[code] = isPrivate && isShared ? 2 : isPrivate ? 1 : 0;
    }
  });

  function pagesByState(runs, low, high) {
    const counts = new Float64Array(N);
    for (let i = Math.max(place(runs.starts, low), 0); i < runs.starts.length && runs.starts[i] < high; i++) {
      const end = i + 1 < runs.starts.length ? runs.starts[i + 1] : TOTAL;
      const pages = Math.min(end, high) - Math.max(runs.starts[i], low);
      for (let s = 0; s < N; s++) counts[s] += pages * shares[runs.codes[i] * N + s];
    }
    return counts;
  }

  // ---- addresses -------------------------------------------------------------------------------------------
  const firsts = meta.ranges.map((range) => range.first);
  function gpaPage(position) {
    const range = meta.ranges[Math.max(place(firsts, Math.min(position, TOTAL - 1)), 0)];
    return range.page + (position - range.first);
  }
  function positionOf(page) {
    const range = meta.ranges.find((one) => page >= one.page && page < one.page + one.pages);
    return range ? range.first + (page - range.page) : null;
  }
  const hex = (page) => "0x" + (page < 2 ** 40 ? (page * PAGE).toString(16) : page.toString(16) + "000");
  function sizeWords(pages) {
    const units = [[2 ** 48, "EiB"], [2 ** 38, "PiB"], [2 ** 28, "TiB"], [2 ** 18, "GiB"], [2 ** 8, "MiB"], [0.25, "KiB"]];
    const [unit, name] = units.find(([one]) => pages >= one) || units[5];
    return `${+(pages / unit).toPrecision(3)} ${name}`;
  }
  const number = (value) => value.toLocaleString("en");
  const percent = (share) => share > 0 && share < 0.001 ? "<0.1 %" : `${(share * 100).toFixed(1)} %`;
  function rangeWords(low, high) {
    const first = gpaPage(low), last = gpaPage(high - 1);
    return high - low === 1 ? hex(first) : `${hex(first)} to ${hex(last + 1)}`;
  }

  // How much of a range large entries could map: pages in whole aligned blocks of one attribute.
  function mappable(runs, low, high, block) {
    let mapped = 0, all = 0;
    for (const piece of meta.pieces) {
      const from = Math.max(low, piece.first), to = Math.min(high, piece.first + piece.pages);
      if (from >= to) continue;
      all += to - from;
      if (piece.shift % block) continue;
      const skew = piece.page - piece.first; // from positions to gpa pages
      let i = Math.max(place(runs.starts, from), 0), start = from, side = sides[runs.codes[i]];
      for (i++; start < to; i++) {
        const end = Math.min(i < runs.starts.length ? runs.starts[i] : TOTAL, to);
        const following = end < to ? sides[runs.codes[i]] : -1;
        if (following === side) continue;
        if (side < 2) {
          const whole = Math.floor((end + skew) / block) - Math.ceil((start + skew) / block);
          mapped += Math.max(whole, 0) * block;
        }
        start = end;
        side = following;
      }
    }
    return all ? mapped / all : 0;
  }

  // ---- since when, and why ---------------------------------------------------------------------------------
  const kinds = meta.kinds.map(([step, caller, call, flags, outcome, set, clear]) =>
    ({ step, caller, call, flags, outcome, set, clear }));

  // Follows one page through all operations that touched it, as History does.
  function since(position, t) {
    if (meta.cell > 1 || !events.n || meta.unit !== "operations") return null;
    const page = gpaPage(position), codes = codesOf(position);
    let mask = meta.palette[codes[0]], last = -1;
    if (mask === null) return null;
    const touched = [];
    for (let i = 0; i < events.n && events.operation[i] < times[t]; i++) {
      if (events.operation[i] < times[0]) continue;
      if (page < events.first[i] || page >= events.first[i] + events.done[i]) continue;
      const { set, clear } = kinds[events.kind[i]], after = (mask & ~clear) | set;
      touched.push(i);
      if (after !== mask) { mask = after; last = i; }
    }
    if (mask === meta.palette[codes[t]]) return { event: last, exact: true };
    let changed = t;
    while (changed > 0 && codes[changed - 1] === codes[t]) changed--;
    const before = touched.filter((i) => events.operation[i] < times[changed]);
    return before.length ? { event: before[before.length - 1], exact: false } : null;
  }

  function changedAt(low, high, t) { // the last snapshot in which something changed in a range
    for (let k = t; k > 0; k--) {
      const at = place(changes[k].starts, high - 1);
      if (at >= 0 && changes[k].ends[at] > low) return k;
    }
    return 0;
  }

  function eventWords(i) {
    const kind = kinds[events.kind[i]], flags = kind.flags ? ` with ${kind.flags}` : "";
    return `operation ${number(events.operation[i])}: ${kind.step}${flags}, ` +
      `${hex(events.first[i])} + ${sizeWords(events.asked[i])}, by the ${kind.caller} (${kind.call})`;
  }

  function lastTouching(low, high, t) {
    const first = gpaPage(low), end = gpaPage(high - 1) + 1;
    for (let i = place(events.operation, times[t] - 0.5); i >= 0; i--) {
      const { set, clear } = kinds[events.kind[i]];
      if ((set || clear) && events.done[i] && events.first[i] < end && events.first[i] + events.done[i] > first) return i;
    }
    return -1;
  }

  function sinceWords(low, high, t) {
    if (high - low === meta.cell && meta.cell === 1) {
      const found = since(low, t);
      if (found && found.exact) {
        return found.event < 0 ? "unchanged since the first snapshot" : `since ${eventWords(found.event)}`;
      }
      if (found) return `last touched by ${eventWords(found.event)}`;
    } else if (events.n && meta.unit === "operations") {
      const i = lastTouching(low, high, t);
      if (i >= 0) return `last touched by ${eventWords(i)}`;
    }
    const k = changedAt(low, high, t);
    if (!k) return "unchanged since the first snapshot";
    return `changed between ${timeWords(k - 1)} and ${timeWords(k)}`;
  }

  const timeWords = (t) => meta.unit === "operations" ? `operation ${number(times[t])}` : `${times[t]} ${meta.unit}`;

  // ---- the curve -------------------------------------------------------------------------------------------
  function toCurve(order, x, y) { // the place along it of a cell; begins at (0, 0), ends at (2^order - 1, 0)
    let d = 0;
    for (let s = 2 ** (order - 1); s >= 1; s /= 2) {
      const right = x >= s ? 1 : 0, lower = y >= s ? 1 : 0;
      d = d * 4 + ((3 * right) ^ lower);
      if (right) x -= s;
      if (lower) y -= s;
      if (!lower) {
        const turned = right ? s - 1 - x : x;
        x = right ? s - 1 - y : y;
        y = turned;
      }
    }
    return d;
  }
  function fromCurve(order, d) {
    let x = 0, y = 0;
    for (let level = 0; level < order; level++) {
      const pair = d % 4, right = pair >> 1, lower = (pair ^ right) & 1, last = 2 ** level - 1;
      if (!lower) {
        if (right) { x = last - x; y = last - y; }
        [x, y] = [y, x];
      }
      x += right * 2 ** level;
      y += lower * 2 ** level;
      d = Math.floor(d / 4);
    }
    return [x, y];
  }

  // ---- the view --------------------------------------------------------------------------------------------
  const map = $("map"), context = map.getContext("2d", { alpha: false });
  const overlay = $("overlay"), above = overlay.getContext("2d");
  const strip = $("strip"), trend = $("trend"), past = $("past");
  const ORDER = Math.max(Math.ceil(Math.log2(TOTAL) / 2), 1);
  const view = { mode: "address", t: times.length - 1, row: 0, top: 0, size: ORDER, x: 0, y: 0 };
  const shown = new Array(N).fill(true);
  let pinned = null, hovered = null, cursor = null, playing = 0;
  let area = { left: 0, top: 0, width: 1, height: 1 }; // of the cells, in CSS pixels of the canvas

  const columnsMost = () => (map.clientWidth < 560 ? 128 : 256);
  const columnsOf = (row) => Math.min(columnsMost(), 2 ** row);
  const rowsOf = (row) => Math.max(Math.floor(area.height / (area.width / columnsOf(row))), 1);
  function widestRow() {
    let row = 4;
    while (Math.ceil(TOTAL / 2 ** row) > rowsOf(row)) row++;
    return row;
  }

  function layOut() {
    const width = map.clientWidth, height = map.clientHeight, gutter = width < 560 ? 78 : 96;
    if (view.mode === "address") {
      area = { left: gutter, top: 0, width: width - gutter, height };
    } else {
      const side = Math.min(width, height);
      area = { left: Math.floor((width - side) / 2), top: 0, width: side, height: side };
    }
    const ratio = window.devicePixelRatio || 1;
    for (const canvas of [map, overlay, strip, trend, past]) {
      const w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
      if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
    }
    clamp();
  }

  function clamp() {
    view.t = Math.min(Math.max(view.t, 0), times.length - 1);
    const widest = widestRow();
    view.row = Math.min(Math.max(view.row, 4), widest);
    const span = 2 ** view.row, rows = Math.ceil(TOTAL / span);
    view.top = Math.min(Math.max(Math.round(view.top / span), 0), Math.max(rows - rowsOf(view.row), 0)) * span;
    view.size = Math.min(Math.max(view.size, Math.min(3, ORDER)), ORDER);
    const cell = cellSide(), most = 2 ** ORDER - 2 ** view.size;
    view.x = Math.min(Math.max(Math.round(view.x / cell) * cell, 0), most);
    view.y = Math.min(Math.max(Math.round(view.y / cell) * cell, 0), most);
  }

  const gridSide = () => Math.min(columnsMost(), 2 ** view.size); // cells of a side along the curve
  const cellSide = () => 2 ** view.size / gridSide(); // pages of a cell's side
  function grid() {
    if (view.mode === "hilbert") return { columns: gridSide(), rows: gridSide(), pages: cellSide() ** 2 };
    const columns = columnsOf(view.row);
    const rows = Math.min(rowsOf(view.row) + 1, Math.ceil((TOTAL - view.top) / 2 ** view.row));
    return { columns, rows, pages: 2 ** view.row / columns };
  }

  // Width and height of a cell in CSS pixels. Rows are stretched where all of memory takes less than the height.
  function cellSize() {
    const { columns } = grid(), width = area.width / columns;
    if (view.mode === "hilbert") return [width, width];
    const all = Math.ceil(TOTAL / 2 ** view.row);
    return [width, all <= rowsOf(view.row) ? Math.min(area.height / all, width * 2.5) : width];
  }

  // The positions that a cell stands for, or null.
  function cellRange(column, row) {
    const { columns, rows, pages } = grid();
    if (column < 0 || row < 0 || column >= columns || row >= rows) return null;
    let low;
    if (view.mode === "hilbert") {
      const side = cellSide();
      low = toCurve(ORDER - Math.log2(side), view.x / side + column, view.y / side + row) * pages;
    } else {
      low = view.top + row * 2 ** view.row + column * pages;
    }
    return low < TOTAL ? { low, high: Math.min(low + pages, TOTAL) } : null;
  }

  // The first position of every cell, row by row. Along the curve that is kept, since time alone changes most.
  let placed = { key: "" };
  function cellPlaces() {
    const { columns, rows, pages } = grid(), key = [view.mode, view.size, view.x, view.y, view.top, columns, rows, pages].join();
    if (placed.key === key) return placed.lows;
    const lows = new Float64Array(columns * rows);
    if (view.mode === "hilbert") {
      const side = cellSide(), order = ORDER - Math.log2(side), x = view.x / side, y = view.y / side;
      for (let i = 0; i < lows.length; i++) lows[i] = toCurve(order, x + i % columns, y + Math.floor(i / columns)) * pages;
    } else {
      for (let i = 0; i < lows.length; i++) lows[i] = view.top + i * pages;
    }
    placed = { key, lows };
    return lows;
  }

  function cellAt(x, y) { // CSS pixels of the canvas
    const [width, height] = cellSize();
    if (x < area.left || y < area.top || x >= area.left + area.width || y >= area.top + area.height) return null;
    return { column: Math.floor((x - area.left) / width), row: Math.floor((y - area.top) / height) };
  }

  function cellOf(position) { // where a position is drawn, or null
    const { columns, rows, pages } = grid();
    let column, row;
    if (view.mode === "hilbert") {
      const side = cellSide(), [x, y] = fromCurve(ORDER - Math.log2(side), Math.floor(position / pages));
      column = x - view.x / side;
      row = y - view.y / side;
    } else {
      const cell = Math.floor((position - view.top) / pages);
      row = Math.floor(cell / columns);
      column = cell - row * columns;
    }
    return column >= 0 && row >= 0 && column < columns && row < rows ? { column, row } : null;
  }

  function visible() { // positions that are seen: a stretch of addresses, or of the curve around the window
    const { columns, rows, pages } = grid();
    if (view.mode === "address") {
      const fitting = Math.min(rows, rowsOf(view.row));
      return { low: view.top, high: Math.min(view.top + fitting * columns * pages, TOTAL) };
    }
    let low = Infinity, high = 0;
    for (let i = 0; i < columns; i++) { // the curve leaves a window by its sides
      for (const [c, r] of [[i, 0], [i, rows - 1], [0, i], [columns - 1, i]]) {
        const range = cellRange(c, r);
        if (range) { low = Math.min(low, range.low); high = Math.max(high, range.high); }
      }
    }
    if (cellOf(TOTAL - 1)) high = TOTAL; // or end in it
    return high ? { low, high } : { low: 0, high: TOTAL };
  }

  // ---- drawing ---------------------------------------------------------------------------------------------
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const palette = STATES.map((state) => rgb(state.colour));
  let tints = null; // of each code: visible share, and red, green, blue weighted by it

  function tint() {
    tints = new Float32Array(meta.palette.length * 4);
    for (let code = 0; code < meta.palette.length; code++) {
      for (let s = 0; s < N; s++) {
        const share = shown[s] ? shares[code * N + s] : 0;
        tints[code * 4] += share;
        for (let c = 0; c < 3; c++) tints[code * 4 + 1 + c] += share * palette[s][c];
      }
    }
  }

  function painter(background) {
    const all = shown.every(Boolean), [red, green, blue] = background;
    // What is left of a cell when some states are hidden is never fainter than it can be seen.
    return (data, at, share, r, g, b, present) => {
      if (!present || !share) { data[at] = red; data[at + 1] = green; data[at + 2] = blue; data[at + 3] = 255; return; }
      const alpha = all ? 1 : Math.max(share / present, 0.45);
      data[at] = Math.round(r / share * alpha + red * (1 - alpha));
      data[at + 1] = Math.round(g / share * alpha + green * (1 - alpha));
      data[at + 2] = Math.round(b / share * alpha + blue * (1 - alpha));
      data[at + 3] = 255;
    };
  }

  function drawCells(runs) {
    const { columns, rows, pages } = grid(), image = new ImageData(columns, rows), lows = cellPlaces();
    paintRuns(image.data, runs, lows.length, (i) => lows[i], pages);
    return image;
  }

  // Paints pixels that stand for as many pages each, from a position on: the mean of the pages' colours.
  function paintRuns(data, runs, count, lowOf, pages) {
    const paint = painter(rgb(style("--hidden"))), { starts, codes } = runs, n = starts.length;
    let i = 0;
    for (let pixel = 0; pixel < count; pixel++) {
      const low = lowOf(pixel), high = Math.min(low + pages, TOTAL);
      if (low >= TOTAL) { paint(data, pixel * 4, 0, 0, 0, 0, 0); continue; }
      // The next cell is mostly near: in the same run, or the one after it.
      if (starts[i] > low || (i + 2 < n && starts[i + 2] <= low)) i = place(starts, low);
      while (i + 1 < n && starts[i + 1] <= low) i++;
      let share = 0, r = 0, g = 0, b = 0, present = 0;
      for (let k = i; k < n && starts[k] < high; k++) {
        const end = k + 1 < n ? starts[k + 1] : TOTAL, code = codes[k] * 4;
        const part = (end < high ? end : high) - (starts[k] > low ? starts[k] : low);
        share += part * tints[code];
        r += part * tints[code + 1];
        g += part * tints[code + 2];
        b += part * tints[code + 3];
        if (sides[codes[k]] !== 3) present += part;
      }
      paint(data, pixel * 4, share, r, g, b, present);
    }
  }

  const scratch = document.createElement("canvas");
  function drawMap() {
    const began = performance.now(), ratio = window.devicePixelRatio || 1, runs = runsAt(view.t);
    const image = drawCells(runs), [width, height] = cellSize();
    scratch.width = image.width;
    scratch.height = image.height;
    scratch.getContext("2d").putImageData(image, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = style("--surface");
    context.fillRect(0, 0, map.clientWidth, map.clientHeight);
    context.imageSmoothingEnabled = false;
    context.save();
    context.beginPath();
    context.rect(area.left, area.top, area.width, area.height);
    context.clip();
    context.drawImage(scratch, area.left, area.top, image.width * width, image.height * height);
    if (width >= 9) drawLines(image.width, image.height, width, height);
    context.restore();
    if (view.mode === "address") drawGutter(width, height);
    drawing = performance.now() - began;
  }
  let drawing = 0;

  function drawLines(columns, rows, width, height) {
    context.strokeStyle = style("--surface");
    context.lineWidth = 1;
    context.beginPath();
    for (let c = 1; c < columns; c++) {
      context.moveTo(area.left + c * width, area.top);
      context.lineTo(area.left + c * width, area.top + rows * height);
    }
    for (let r = 1; r < rows; r++) {
      context.moveTo(area.left, area.top + r * height);
      context.lineTo(area.left + area.width, area.top + r * height);
    }
    context.stroke();
  }

  function drawGutter(width, height) {
    const { rows } = grid(), step = Math.max(2 ** Math.ceil(Math.log2(34 / height)), 1);
    context.fillStyle = style("--text-soft");
    context.font = `${map.clientWidth < 560 ? 10 : 11}px ui-monospace, monospace`;
    context.textAlign = "right";
    context.textBaseline = "top";
    context.strokeStyle = style("--text");
    const span = 2 ** view.row;
    for (let row = 0; row < rows && (row + 0.4) * height < area.height; row += step) {
      context.fillText(hex(gpaPage(view.top + row * span)), area.left - 6, area.top + row * height);
    }
    // A hole between two ranges: a line along the cells where the second one begins.
    for (const range of meta.ranges.slice(1)) {
      const cell = cellOf(range.first);
      if (!cell) continue;
      const x = area.left + cell.column * width, y = area.top + cell.row * height;
      context.beginPath();
      context.moveTo(area.left, y + (cell.column ? height : 0));
      context.lineTo(x, y + (cell.column ? height : 0));
      context.lineTo(x, y);
      context.lineTo(area.left + area.width, y);
      context.stroke();
    }
  }

  function drawOverlay() {
    const ratio = window.devicePixelRatio || 1;
    above.setTransform(ratio, 0, 0, ratio, 0, 0);
    above.clearRect(0, 0, overlay.clientWidth, overlay.clientHeight);
    if (pinned) outline(pinned, style("--accent"), 2.5);
    const cell = cursor || hovered;
    const range = cell && cellRange(cell.column, cell.row);
    if (range) outline(range, style("--text"), 1.5);
    if (view.mode === "hilbert") drawEnds();
  }

  // Strokes the border of the cells that stand for a range.
  function outline(range, colour, width) {
    const { columns, rows } = grid(), [wide, high] = cellSize();
    const inside = (column, row) => {
      const own = cellRange(column, row);
      return own !== null && own.low < range.high && own.high > range.low;
    };
    above.beginPath();
    const rowsSeen = Math.min(rows, Math.ceil(area.height / high));
    let from = 0, to = rowsSeen - 1;
    if (view.mode === "address") {
      from = Math.max(Math.floor((range.low - view.top) / 2 ** view.row), 0);
      to = Math.min(Math.floor((range.high - 1 - view.top) / 2 ** view.row), rowsSeen - 1);
    }
    for (let row = from; row <= to; row++) {
      for (let column = 0; column < columns; column++) {
        if (!inside(column, row)) continue;
        const x = area.left + column * wide, y = area.top + row * high;
        if (!inside(column, row - 1)) { above.moveTo(x, y); above.lineTo(x + wide, y); }
        if (!inside(column, row + 1)) { above.moveTo(x, y + high); above.lineTo(x + wide, y + high); }
        if (!inside(column - 1, row)) { above.moveTo(x, y); above.lineTo(x, y + high); }
        if (!inside(column + 1, row)) { above.moveTo(x + wide, y); above.lineTo(x + wide, y + high); }
      }
    }
    above.strokeStyle = style("--surface");
    above.lineWidth = width + 2;
    above.stroke();
    above.strokeStyle = colour;
    above.lineWidth = width;
    above.stroke();
  }

  function drawEnds() { // where the curve begins, a circle; where it ends, a square
    const [side] = cellSize();
    above.fillStyle = style("--surface");
    above.strokeStyle = style("--text");
    above.lineWidth = 1.5;
    for (const [position, round] of [[0, true], [TOTAL - 1, false]]) {
      const cell = cellOf(position);
      if (!cell) continue;
      const x = area.left + (cell.column + 0.5) * side, y = area.top + (cell.row + 0.5) * side;
      above.beginPath();
      if (round) above.arc(x, y, 5, 0, 7); else above.rect(x - 4.5, y - 4.5, 9, 9);
      above.fill();
      above.stroke();
    }
  }

  // All of memory in one line, and the part that is seen.
  function drawStrip(runs) {
    const width = strip.width, height = strip.height, own = strip.getContext("2d");
    const image = new ImageData(width, 1);
    paintRuns(image.data, runs, width, (x) => Math.floor(x / width * TOTAL), Math.max(Math.ceil(TOTAL / width), 1));
    for (let y = 0; y < height; y++) own.putImageData(image, 0, y);
    const { low, high } = visible(), ratio = window.devicePixelRatio || 1;
    own.strokeStyle = style("--text");
    own.lineWidth = 2 * ratio;
    const x = low / TOTAL * width, w = Math.max((high - low) / TOTAL * width, 3 * ratio);
    own.strokeRect(x + ratio, ratio, w - 2 * ratio, height - 2 * ratio);
  }

  // States over time, stacked; the lines are what large entries could map.
  function drawTrend(canvas, counts, lines) {
    const own = canvas.getContext("2d"), width = canvas.width, height = canvas.height;
    const ratio = window.devicePixelRatio || 1;
    own.fillStyle = style("--hidden");
    own.fillRect(0, 0, width, height);
    const n = times.length, first = times[0], span = times[n - 1] - first || 1;
    const at = (t) => n === 1 ? 0 : (times[t] - first) / span * width;
    for (let t = 0; t < n; t++) {
      const x = at(t), end = t + 1 < n ? at(t + 1) : width + 1, total = counts[t].reduce((a, b) => a + b, 0) || 1;
      let y = height;
      for (const s of stacking) {
        const h = counts[t][s] / total * height;
        if (shown[s] && h) {
          own.fillStyle = STATES[s].colour;
          own.fillRect(Math.floor(x), y - h, Math.max(Math.ceil(end) - Math.floor(x), 1), h + 0.5);
        }
        y -= h;
      }
    }
    for (const [values, dash] of lines) {
      own.beginPath();
      values.forEach((value, t) => own.lineTo(at(t), height - value * (height - 2 * ratio) - ratio));
      own.setLineDash([]);
      own.lineWidth = 4 * ratio;
      own.strokeStyle = style("--surface");
      own.stroke();
      own.setLineDash(dash.map((d) => d * ratio));
      own.lineWidth = 1.6 * ratio;
      own.strokeStyle = style("--text");
      own.stroke();
      own.setLineDash([]);
    }
    const x = Math.min(Math.max(at(view.t), ratio), width - ratio);
    own.fillStyle = style("--surface");
    own.fillRect(x - 2.5 * ratio, 0, 5 * ratio, height);
    own.fillStyle = style("--accent");
    own.fillRect(x - 1.25 * ratio, 0, 2.5 * ratio, height);
  }
  // In the order of the pictures: memory in use below, what has none on top.
  const stacking = [...Array(N).keys()].reverse().filter((s) => s < N - 2).concat([N - 2, N - 1]);

  // ---- the panel -------------------------------------------------------------------------------------------
  function element(tag, text, name) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  }

  const rows = STATES.map((state, s) => {
    const row = element("tr"), button = element("button", undefined, "state");
    const swatch = element("span", undefined, "swatch");
    swatch.style.background = state.colour;
    button.type = "button";
    button.title = state.meaning;
    button.setAttribute("aria-pressed", "true");
    button.append(swatch, element("span", state.name));
    button.addEventListener("click", () => toggle(s));
    const head = element("th");
    head.scope = "row";
    head.append(button);
    row.append(head, element("td"), element("td"));
    $("states-body").append(row);
    return { row, button, view: row.children[1], guest: row.children[2] };
  });

  function toggle(s) {
    shown[s] = !shown[s];
    rows[s].button.setAttribute("aria-pressed", String(shown[s]));
    tint();
    redraw();
  }
  function showAll() {
    shown.fill(true);
    rows.forEach(({ button }) => button.setAttribute("aria-pressed", "true"));
    tint();
    redraw();
  }

  function drawPanel(runs) {
    const { low, high } = visible(), counts = pagesByState(runs, low, high), of = high - low;
    rows.forEach(({ row, view: seen, guest }, s) => {
      const inGuest = meta.counts[view.t][s];
      row.hidden = !meta.counts.some((one) => one[s]);
      seen.textContent = percent(counts[s] / of);
      guest.textContent = inGuest ? sizeWords(inGuest) : "0";
    });
    $("span").textContent = `${rangeWords(low, high)}, ${sizeWords(of)}`;
    $("cell").textContent = view.mode === "address"
      ? `${sizeWords(grid().pages)} per cell, ${sizeWords(2 ** view.row)} per row`
      : `${sizeWords(grid().pages)} per cell`;
    for (const [id, block, name] of [["map2m", 512, "2m"], ["map1g", 512 * 512, "1g"]]) {
      const whole = meta.mappable[view.t][name];
      $(id).textContent = `${percent(whole)} of the guest, ${percent(mappable(runs, low, high, block))} of the view`;
    }
  }

  function drawTime() {
    $("time").value = view.t;
    const label = meta.labels[view.t] ? `, ${meta.labels[view.t]}` : "";
    const words = `${timeWords(view.t)}, ${meta.phases[view.t]}${label}`;
    $("now").textContent = words;
    $("time").setAttribute("aria-valuetext", words);
    $("count").textContent = `${view.t + 1} of ${times.length}`;
  }

  // ---- pinned ----------------------------------------------------------------------------------------------
  const LISTED = 200;
  let pinnedCounts = null;

  function pin(range) {
    pinned = range;
    $("pinned").hidden = !range;
    if (range) {
      pinnedCounts = countsOverTime(range.low, range.high);
      fillHistory();
    }
    layOut();
    redraw();
  }

  function countsOverTime(low, high) {
    if (low === 0 && high === TOTAL) return meta.counts;
    const base = changes[0], from = Math.max(place(base.starts, low), 0);
    let runs = { starts: [], codes: [] };
    for (let i = from; i < base.starts.length && base.starts[i] < high; i++) {
      runs.starts.push(Math.max(base.starts[i], low));
      runs.codes.push(base.codes[i]);
    }
    const found = [];
    for (let t = 0; t < times.length; t++) {
      if (t) runs = appliedWithin(runs, changes[t], low, high);
      const counts = new Float64Array(N);
      runs.starts.forEach((start, i) => {
        const pages = (i + 1 < runs.starts.length ? runs.starts[i + 1] : high) - start;
        for (let s = 0; s < N; s++) counts[s] += pages * shares[runs.codes[i] * N + s];
      });
      found.push(counts);
    }
    return found;
  }

  function appliedWithin(runs, change, low, high) {
    let j = Math.max(place(change.starts, low), 0);
    const cut = { starts: [], codes: [] };
    let i = 0, at = low;
    const copy = (until) => { // runs as they were, up to a position
      while (at < until) {
        while (i + 1 < runs.starts.length && runs.starts[i + 1] <= at) i++;
        const end = Math.min(i + 1 < runs.starts.length ? runs.starts[i + 1] : high, until);
        add(at, runs.codes[i]);
        at = end;
      }
    };
    const add = (start, code) => {
      if (cut.codes.length && cut.codes[cut.codes.length - 1] === code) return;
      cut.starts.push(start);
      cut.codes.push(code);
    };
    for (; j < change.starts.length && change.starts[j] < high; j++) {
      const from = Math.max(change.starts[j], low), to = Math.min(change.ends[j], high);
      if (from >= to) continue;
      copy(from);
      add(from, change.codes[j]);
      at = to;
    }
    copy(high);
    return cut;
  }

  function touching(low, high) {
    const first = gpaPage(low), end = gpaPage(high - 1) + 1, found = [];
    for (let i = 0; i < events.n; i++) {
      if (events.first[i] < end && events.first[i] + events.asked[i] > first) found.push(i);
    }
    return found;
  }

  let listed = [];
  function fillHistory() {
    const { low, high } = pinned;
    $("pinned-range").textContent = `${rangeWords(low, high)}, ${sizeWords(high - low)}`;
    const found = touching(low, high), at = found.findIndex((i) => events.operation[i] >= times[view.t]);
    const until = at < 0 ? found.length : at, from = Math.max(until - LISTED, 0);
    listed = found.slice(from, from + LISTED);
    $("history-body").replaceChildren(...listed.map((i) => {
      const kind = kinds[events.kind[i]], row = element("tr");
      row.append(
        element("td", number(events.operation[i])), element("td", kind.step + (kind.flags ? ` with ${kind.flags}` : "")),
        element("td", kind.caller), element("td", `${hex(events.first[i])} + ${sizeWords(events.asked[i])}`),
        element("td", kind.outcome),
      );
      row.title = kind.call;
      return row;
    }));
    const total = `${number(found.length)} operation${found.length === 1 ? "" : "s"}`;
    const shownWords = found.length > listed.length ? `${listed.length} of ${total}` : total;
    $("history-count").textContent = events.n
      ? `${shownWords} on it${meta.complete ? "" : "; of this long run not all are kept"}`
      : "The series has no operations, only snapshots.";
  }

  function drawPinned(runs) {
    if (!pinned) return;
    const { low, high } = pinned, counts = pagesByState(runs, low, high);
    const words = [...counts.keys()].filter((s) => counts[s]).map((s) => `${STATES[s].name} ${percent(counts[s] / (high - low))}`);
    $("pinned-states").textContent = words.join(", ") || "no memory there now";
    $("pinned-since").textContent = sinceWords(low, high, view.t);
    drawTrend(past, pinnedCounts, []);
    [...$("history-body").children].forEach((row, k) => {
      row.classList.toggle("later", events.operation[listed[k]] >= times[view.t]);
    });
  }

  // ---- the tip ---------------------------------------------------------------------------------------------
  function tipWords(range) {
    const { low, high } = range, counts = pagesByState(runsAt(view.t), low, high), pages = high - low;
    const lines = [pages > 1 ? `${rangeWords(low, high)}, ${sizeWords(pages)}` : rangeWords(low, high)];
    const code = runsAt(view.t).codes[Math.max(place(runsAt(view.t).starts, low), 0)], mask = meta.palette[code];
    if (pages === 1 && typeof mask === "number") {
      const planes = meta.planes.filter((_, i) => mask >> i & 1);
      lines.push(`${STATES[meta.state_of[mask]].name} (${planes.join(", ") || "no plane is set"})`);
    } else {
      const names = [...counts.keys()].filter((s) => counts[s]);
      lines.push(names.map((s) => `${STATES[s].name}${names.length > 1 ? ` ${percent(counts[s] / pages)}` : ""}`).join(", ") || "no memory there now");
    }
    lines.push(sinceWords(low, high, view.t));
    return lines;
  }

  let tipAt = null;
  function showTip(cell, x, y) {
    tipAt = cell ? [x, y] : null;
    const tip = $("tip"), range = cell && cellRange(cell.column, cell.row);
    tip.hidden = !range;
    if (!range) return;
    tip.replaceChildren(...tipWords(range).map((line) => element("div", line)));
    const box = $("stage").getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(Math.min(x + 14, box.width - own.width - 4), 4)}px`;
    tip.style.top = `${y + 18 + own.height > box.height ? Math.max(y - own.height - 10, 0) : y + 18}px`;
    return range;
  }

  // ---- moving ----------------------------------------------------------------------------------------------
  function zoom(steps, x, y) { // about a point of the canvas, in CSS pixels
    const cell = cellAt(x, y) || { column: Math.floor(grid().columns / 2), row: Math.floor(grid().rows / 2) };
    const range = cellRange(cell.column, cell.row), middle = range ? Math.floor((range.low + range.high) / 2) : null;
    if (view.mode === "address") {
      view.row -= steps;
      clamp();
      if (middle !== null) {
        const span = 2 ** view.row;
        view.top = (Math.floor(middle / span) - Math.floor((y - area.top) / cellSize()[1])) * span;
      }
    } else {
      const side = cellSide(), px = view.x + (cell.column + 0.5) * side, py = view.y + (cell.row + 0.5) * side;
      const fx = (cell.column + 0.5) / grid().columns, fy = (cell.row + 0.5) / grid().rows;
      view.size -= steps;
      view.size = Math.min(Math.max(view.size, Math.min(3, ORDER)), ORDER);
      view.x = px - fx * 2 ** view.size;
      view.y = py - fy * 2 ** view.size;
    }
    clamp();
    redraw();
  }

  function pan(columns, rows) { // by cells
    if (view.mode === "address") {
      view.top += rows * 2 ** view.row;
    } else {
      view.x += columns * cellSide();
      view.y += rows * cellSide();
    }
    clamp();
    redraw();
  }

  function centre(position) {
    if (view.mode === "address") {
      const span = 2 ** view.row;
      view.top = (Math.floor(position / span) - Math.floor(rowsOf(view.row) / 2)) * span;
    } else {
      const [x, y] = fromCurve(ORDER, position);
      view.x = x - 2 ** view.size / 2;
      view.y = y - 2 ** view.size / 2;
    }
    clamp();
    redraw();
  }

  function show(range) { // a range as large as it can be seen whole
    if (view.mode === "address") {
      view.row = 4;
      while (view.row < widestRow() && (Math.floor((range.high - 1) / 2 ** view.row) - Math.floor(range.low / 2 ** view.row) + 1) > rowsOf(view.row)) view.row++;
    } else {
      view.size = Math.min(Math.max(Math.ceil(Math.log2(range.high - range.low) / 2) + 1, 3), ORDER);
    }
    clamp();
    centre(Math.floor((range.low + range.high) / 2));
  }

  function fit() {
    view.row = widestRow();
    view.top = 0;
    view.size = ORDER;
    view.x = view.y = 0;
    clamp();
    redraw();
  }

  function setMode(mode) {
    if (mode === view.mode) return;
    const { low, high } = visible(), whole = high - low === TOTAL;
    view.mode = mode;
    for (const id of ["address", "hilbert"]) $(id).setAttribute("aria-pressed", String(id === mode));
    cursor = hovered = null;
    layOut();
    if (whole) fit(); else show({ low, high });
  }

  function setTime(t) {
    view.t = t;
    clamp();
    if (pinned) fillHistory();
    redraw();
  }

  function play(on) {
    clearInterval(playing);
    playing = 0;
    if (on) {
      if (view.t === times.length - 1) setTime(0);
      playing = setInterval(() => {
        if (view.t < times.length - 1) setTime(view.t + 1); else play(false);
      }, 120);
    }
    $("play").textContent = on ? "Pause" : "Play";
    $("play").setAttribute("aria-pressed", String(Boolean(on)));
  }

  // ---- input -----------------------------------------------------------------------------------------------
  const pointers = new Map();
  let drag = null, pinch = 0;
  const at = (event) => {
    const box = map.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  overlay.addEventListener("pointerdown", (event) => {
    overlay.setPointerCapture(event.pointerId);
    const [x, y] = at(event);
    pointers.set(event.pointerId, [x, y]);
    drag = { x, y, moved: false, extend: event.shiftKey, from: cellAt(x, y), view: { ...view } };
    pinch = 0;
  });
  overlay.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    cursor = null;
    if (pointers.has(event.pointerId)) pointers.set(event.pointerId, [x, y]);
    if (pointers.size === 2) {
      const [one, other] = [...pointers.values()], apart = Math.hypot(one[0] - other[0], one[1] - other[1]);
      pinch = pinch || apart;
      const steps = Math.trunc(Math.log2(apart / pinch) * 1.5);
      if (steps) {
        zoom(steps, (one[0] + other[0]) / 2, (one[1] + other[1]) / 2);
        pinch = apart;
      }
      if (drag) drag.moved = true;
      return;
    }
    if (drag && pointers.size === 1) {
      const [wide, high] = cellSize();
      if (Math.hypot(x - drag.x, y - drag.y) > 4) drag.moved = true;
      if (drag.moved && drag.extend) {
        selectTo(cellAt(x, y));
      } else if (drag.moved) {
        Object.assign(view, { top: drag.view.top, x: drag.view.x, y: drag.view.y });
        pan(Math.round((drag.x - x) / wide), Math.round((drag.y - y) / high));
      }
    }
    hovered = cellAt(x, y);
    showTip(drag && drag.moved ? null : hovered, x, y);
    later("overlay");
  });
  const release = (event) => {
    const [x, y] = at(event);
    pointers.delete(event.pointerId);
    if (drag && !drag.moved && event.type === "pointerup") {
      const cell = cellAt(x, y), range = cell && cellRange(cell.column, cell.row);
      if (range) pin(range);
    }
    if (!pointers.size) drag = null;
  };
  overlay.addEventListener("pointerup", release);
  overlay.addEventListener("pointercancel", release);
  overlay.addEventListener("pointerleave", () => { hovered = null; showTip(null); later("overlay"); });

  function selectTo(cell) { // shift and drag: all from one cell to another
    const first = drag.from && cellRange(drag.from.column, drag.from.row), last = cell && cellRange(cell.column, cell.row);
    if (first && last) pin({ low: Math.min(first.low, last.low), high: Math.max(first.high, last.high) });
  }

  let wheeled = 0;
  overlay.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x, y] = at(event);
    if (event.shiftKey) {
      const by = Math.sign(event.deltaY || event.deltaX) * Math.max(Math.round(rowsOf(view.row) / 8), 1);
      pan(0, by);
      return;
    }
    wheeled += event.deltaY;
    if (Math.abs(wheeled) < 40) return;
    zoom(-Math.sign(wheeled), x, y);
    wheeled = 0;
    showTip(hovered = cellAt(x, y), x, y);
  }, { passive: false });
  overlay.addEventListener("dblclick", (event) => zoom(2, ...at(event)));

  function moveCursor(columns, rows_) {
    const { columns: wide, rows: high } = grid(), most = Math.min(high, view.mode === "address" ? rowsOf(view.row) : high);
    const from = cursor || hovered || { column: 0, row: 0 };
    let column = from.column + (cursor ? columns : 0), row = from.row + (cursor ? rows_ : 0);
    if (view.mode === "address") { // along a row, and on to the next one
      if (column < 0 && row > 0) { row--; column = wide - 1; }
      if (column >= wide && row < most - 1) { row++; column = 0; }
    }
    if (row < 0 || row >= most) { pan(0, row < 0 ? -1 : 1); row = Math.min(Math.max(row, 0), most - 1); }
    if (view.mode === "hilbert" && (column < 0 || column >= wide)) pan(column < 0 ? -1 : 1, 0);
    cursor = { column: Math.min(Math.max(column, 0), wide - 1), row };
    const range = showTip(cursor, ...centreOf(cursor));
    if (range) $("live").textContent = tipWords(range).join(". ");
    later("overlay");
  }

  function centreOf(cell) { // in CSS pixels
    const [width, height] = cellSize();
    return [area.left + (cell.column + 0.5) * width, area.top + (cell.row + 0.5) * height];
  }
  function middle() {
    const cell = cursor || hovered;
    return cell ? centreOf(cell) : [area.left + area.width / 2, area.top + area.height / 2];
  }
  const onCursor = () => cursor && cellRange(cursor.column, cursor.row);
  const KEYS = {
    "+": () => zoom(1, ...middle()), "=": () => zoom(1, ...middle()), "-": () => zoom(-1, ...middle()),
    f: fit, h: () => setMode(view.mode === "address" ? "hilbert" : "address"),
    " ": () => play(!playing), ",": () => setTime(view.t - 1), ".": () => setTime(view.t + 1),
    "[": () => setTime(0), "]": () => setTime(times.length - 1),
    PageUp: () => pan(0, -Math.max(rowsOf(view.row) - 1, 1)), PageDown: () => pan(0, Math.max(rowsOf(view.row) - 1, 1)),
    Home: () => centre(0), End: () => centre(TOTAL - 1),
    Escape: () => { cursor = null; showTip(null); pin(null); },
    0: showAll, "?": () => $("help").showModal(),
  };
  STATES.forEach((_, s) => { KEYS[s + 1] = () => toggle(s); });
  const ON_MAP = {
    ArrowLeft: () => moveCursor(-1, 0), ArrowRight: () => moveCursor(1, 0),
    ArrowUp: () => moveCursor(0, -1), ArrowDown: () => moveCursor(0, 1),
    Enter: () => { if (onCursor()) pin(onCursor()); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const target = event.target, typing = target.matches("input, select, textarea");
    const own = target === overlay && ON_MAP[event.key];
    const pressed = own || (typing && event.key !== "Escape" && event.key !== "?" ? null : KEYS[event.key]);
    if (!pressed || (event.key === " " && target.matches("button"))) return;
    event.preventDefault();
    pressed();
  });

  $("address").addEventListener("click", () => setMode("address"));
  $("hilbert").addEventListener("click", () => setMode("hilbert"));
  $("closer").addEventListener("click", () => zoom(1, ...middle()));
  $("wider").addEventListener("click", () => zoom(-1, ...middle()));
  $("fit").addEventListener("click", fit);
  $("every").addEventListener("click", showAll);
  $("ask").addEventListener("click", () => $("help").showModal());
  $("close").addEventListener("click", () => $("help").close());
  $("play").addEventListener("click", () => play(!playing));
  $("before").addEventListener("click", () => setTime(view.t - 1));
  $("after").addEventListener("click", () => setTime(view.t + 1));
  $("time").addEventListener("input", () => setTime(Number($("time").value)));
  $("unpin").addEventListener("click", () => pin(null));
  $("show").addEventListener("click", () => { if (pinned) show(pinned); });
  $("go").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("gpa").value.trim().replaceAll("_", "").replace(/^0x/i, "");
    const page = /^[0-9a-f]{1,16}$/i.test(text) ? Number(BigInt("0x" + text) >> 12n) : NaN;
    const position = Number.isNaN(page) ? null : positionOf(page);
    $("gpa").setCustomValidity(position === null ? "no guest memory at that address" : "");
    $("gpa").reportValidity();
    if (position === null) return;
    centre(position);
    pin({ low: position - position % meta.cell, high: Math.min(position - position % meta.cell + meta.cell, TOTAL) });
  });
  $("gpa").addEventListener("input", () => $("gpa").setCustomValidity(""));
  const seek = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = strip.getBoundingClientRect();
    centre(Math.min(Math.max(Math.floor((event.clientX - box.left) / box.width * TOTAL), 0), TOTAL - 1));
  };
  strip.addEventListener("pointerdown", seek);
  strip.addEventListener("pointermove", seek);
  for (const canvas of [trend, past]) {
    const jump = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = canvas.getBoundingClientRect(), span = times[times.length - 1] - times[0];
      setTime(Math.max(place(times, times[0] + (event.clientX - box.left) / box.width * span), 0));
    };
    canvas.addEventListener("pointerdown", jump);
    canvas.addEventListener("pointermove", jump);
  }

  // ---- frames ----------------------------------------------------------------------------------------------
  const due = new Set();
  function later(what) {
    if (!due.size) requestAnimationFrame(frame);
    due.add(what);
  }
  function redraw() { later("all"); }
  let frames = 0;
  function frame() {
    const all = due.has("all");
    due.clear();
    if (all) {
      const runs = runsAt(view.t);
      drawMap();
      drawStrip(runs);
      drawPanel(runs);
      drawTrend(trend, meta.counts, [[meta.mappable.map((one) => one["2m"]), []], [meta.mappable.map((one) => one["1g"]), [5, 4]]]);
      drawTime();
      drawPinned(runs);
      if (tipAt) showTip(cursor || hovered, ...tipAt); // what is under the pointer has changed
    }
    drawOverlay();
    frames++;
  }
  new ResizeObserver(() => {
    const seen = visible(), whole = seen.low === 0 && seen.high === TOTAL;
    layOut();
    if (whole) fit(); // what showed all of memory still does
    redraw();
  }).observe($("stage"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  $("time").max = times.length - 1;
  $("timeline").hidden = times.length < 2;
  $("over-time").hidden = times.length < 2;
  if (meta.cell > 1) $("detail").textContent = `This series has more detail than a page takes: states are told by ${sizeWords(meta.cell)}.`;
  $("detail").hidden = meta.cell === 1;
  tint();
  layOut();
  fit();
  frame();
  document.documentElement.dataset.ready = "true";

  // For tests and the curious: what is seen, in numbers.
  window.explorer = {
    view, area: () => area, grid, cellRange, cellAt, cellOf, centreOf, visible, runsAt, gpaPage, positionOf, since, sinceWords,
    eventOf: (i) => ({ operation: events.operation[i], ...kinds[events.kind[i]] }),
    mappable: (low, high, block) => mappable(runsAt(view.t), low, high, block),
    pinned: () => pinned, shown, drawing: () => drawing, frames: () => frames, setTime, centre, show,
  };
})();
