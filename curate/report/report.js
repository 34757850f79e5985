// Puts the samples of data.js on the page. Captions and keys are only ever set as text.
"use strict";
(() => {
  const data = window.curateReport;
  const find = (id) => document.getElementById(id);
  // On a phone, two abreast, 48 are ten screens before whatever comes next.
  const SHOWN_AT_ONCE = matchMedia("(max-width: 34rem)").matches ? 12 : 48;
  const LADDER_SIDE = 8;

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  // A page opened from OUT/report can tell where OUT is; a copy of the page elsewhere cannot.
  function outPath() {
    const whole = decodeURIComponent(location.pathname);
    const path = whole.replace(/\/(report|compare)\/[^/]*$/, "");
    return location.protocol === "file:" && path !== whole ? quote(path) : "OUT";
  }
  function quote(path) {
    return /^[\w@%+=:,.\/-]+$/.test(path) ? path : `'${path.replace(/'/g, "'\\''")}'`;
  }
  const out = outPath();

  function percent(share, digits = 1) {
    if (share === null || share === undefined) return "–";
    const least = 10 ** -digits;
    const isHidden = share > 0 && 100 * share < least / 2;
    return isHidden ? `<${least.toFixed(digits)}%` : `${(100 * share).toFixed(digits)}%`;
  }
  const count = (number) => number.toLocaleString("en-US");
  const LABELS = { mismatch_probability: "mismatch", representative_cosine: "cosine" };

  function picture(sample, size) {
    if (!sample.picture) return make("span", { class: "none" }, "no picture");
    const label = sample.caption || "no caption";
    const image = make("img", { src: sample.picture, alt: label, loading: "lazy" });
    image.width = image.height = size;
    return image;
  }

  function verdict(sample, isMoved, isKept) {
    const keep = isMoved ? isKept : sample.keep;
    const word = keep ? "✓ kept" : `✗ ${isMoved ? "above the line" : sample.reason}`;
    // Long codes may break after an underscore.
    const parts = word.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]);
    return make("span", { class: `verdict ${keep ? "kept" : "dropped"}` }, ...parts);
  }

  function card(sample, options = {}) {
    const other = sample.like === undefined ? null : data.samples[sample.like];
    const row = make("div", { class: "row" }, picture(sample, 128));
    if (other && !options.isAlone) {
      const arrow = make("span", { class: "arrow", title: "is a copy of" }, "→");
      row.append(arrow, picture(other, 128));
    }
    const caption = sample.caption
      ? make("bdi", { class: "caption", dir: "auto" }, sample.caption)
      : make("em", {}, "no caption");
    const scores = Object.entries(sample.told || {});
    const shown = options.scores || ["mismatch_probability", "rarity", "representative_cosine"];
    const brief = scores
      .filter(([name]) => shown.includes(name))
      .map(([name, told]) => `${LABELS[name] || name} ${told}`);
    if (sample.kind && sample.kind !== "none") brief.unshift(sample.kind);
    return make(
      "figure",
      { class: "card" },
      row,
      make(
        "figcaption",
        {},
        verdict(sample, "isKept" in options, options.isKept),
        sample.there ? make("small", { class: "there" }, `the other run: ${sample.there}`) : null,
        caption,
        ...(sample.merged || []).map((text) =>
          make("bdi", { class: "merged", dir: "auto" }, `+ ${text}`),
        ),
        make("small", { class: "brief" }, ...brief.map((text) => make("span", {}, text))),
        details(sample, scores),
      ),
    );
  }

  function details(sample, scores) {
    const rows = [
      ["uid", sample.uid],
      ["key", sample.key],
      ["file", sample.file],
      ["size", sample.size ? `${sample.size[0]} × ${sample.size[1]} px` : null],
      ["failed", (sample.failed || []).join(", ") || null],
      ["copy of", sample.earlier ? `${sample.earlier} of an earlier run` : null],
      ["shows", sample.shows],
      ["weight", sample.weight],
      ...scores,
    ];
    const list = make("dl", {});
    for (const [name, value] of rows) {
      if (value === null || value === undefined) continue;
      list.append(make("dt", {}, name), make("dd", {}, make("bdi", {}, String(value))));
    }
    const where = sample.elsewhere ? quote(data.other) : out;
    const command = `curate show ${where} ${sample.uid}`;
    return make(
      "details",
      {},
      make("summary", {}, "all that is known"),
      list,
      make("code", { class: "show", tabindex: "0" }, command),
    );
  }

  function grid(items, options) {
    const wall = make("div", { class: options.isPairs ? "wall pairs" : "wall" });
    let next = 0;
    const more = make("button", { type: "button", class: "more" }, "");
    function add() {
      const end = Math.min(next + SHOWN_AT_ONCE, items.length);
      for (; next < end; next++) wall.append(card(data.samples[items[next]], options));
      more.textContent = `Show ${count(items.length - next)} more`;
      more.hidden = next >= items.length;
    }
    more.addEventListener("click", add);
    add();
    return make("div", {}, wall, more);
  }

  // Galleries: one at a time, so that a page of a thousand pictures stays light.
  const chips = find("chips");
  const wall = find("wall");
  const search = find("search");
  const BROKEN = "unreadable";

  function galleryOf(reason) {
    const exact = data.galleries.find((gallery) => gallery.name === reason);
    return exact || data.galleries.find((gallery) => gallery.name === BROKEN);
  }

  function showGallery(gallery) {
    for (const chip of chips.children) {
      chip.setAttribute("aria-pressed", String(chip.dataset.name === gallery.name));
    }
    const isClusters = gallery.name === "clusters";
    const parts = gallery.groups.map((group) => {
      const of = group.items.length < group.total ? `${group.items.length} of ` : "";
      const number = `${of}${count(group.total)}`;
      const small = isClusters ? "" : make("small", {}, ` ${number}`);
      const heading = group.label ? make("h4", {}, group.label, small) : "";
      const options = { isAlone: isClusters, isPairs: gallery.name.startsWith("duplicate_") };
      return make("div", { class: "group" }, heading, grid(group.items, options));
    });
    const total = gallery.groups.reduce((sum, group) => sum + group.total, 0);
    const told = gallery.groups.length > 1 ? "" : ` (${count(total)})`;
    const isBeside = ["memorized", "threshold"].includes(gallery.name) && parts.length > 1;
    wall.replaceChildren(
      make("h3", {}, gallery.title + told),
      make("p", {}, gallery.meaning),
      make("div", { class: isClusters ? "clusters" : isBeside ? "beside" : "" }, ...parts),
    );
  }

  for (const gallery of data.galleries) {
    const chip = make("button", { type: "button", "aria-pressed": "false" }, gallery.title);
    chip.dataset.name = gallery.name;
    chip.addEventListener("click", () => {
      search.value = "";
      showGallery(gallery);
    });
    chips.append(chip);
  }
  if (data.galleries.length) showGallery(data.galleries[0]);
  else wall.replaceChildren(make("p", {}, "There are no samples."));

  for (const link of document.querySelectorAll("a[data-gallery]")) {
    link.addEventListener("click", (event) => {
      const gallery = galleryOf(link.dataset.gallery);
      if (!gallery) return;
      event.preventDefault();
      search.value = "";
      showGallery(gallery);
      find("galleries").scrollIntoView();
    });
  }

  const haystack = data.samples.map((sample) =>
    [sample.caption, sample.uid, sample.key, ...(sample.merged || [])].join("\n").toLowerCase(),
  );
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    if (!wanted) {
      if (data.galleries.length) showGallery(data.galleries[0]);
      return;
    }
    for (const chip of chips.children) chip.setAttribute("aria-pressed", "false");
    const hits = [];
    haystack.forEach((text, number) => text.includes(wanted) && hits.push(number));
    wall.replaceChildren(
      make("h3", {}, `${count(hits.length)} of ${count(data.samples.length)} samples shown here`),
      grid(hits, {}),
    );
  });

  // The map: circles for the kept, diamonds for the dropped.
  function drawMap() {
    const NAMESPACE = "http://www.w3.org/2000/svg";
    const plane = find("plane");
    const points = [...data.map].sort((one, other) => one[1] - other[1]);
    const isKept = ([item]) => data.samples[item].keep;
    const marks = points.map(([item, x, y]) => {
      const keep = data.samples[item].keep;
      const mark = document.createElementNS(NAMESPACE, keep ? "circle" : "path");
      const left = 8 + x * 344;
      const top = 8 + y * 254;
      if (keep) {
        mark.setAttribute("cx", left);
        mark.setAttribute("cy", top);
        mark.setAttribute("r", 1.9);
      } else mark.setAttribute("d", `M${left} ${top - 2.7}l2.7 2.7l-2.7 2.7l-2.7-2.7z`);
      return mark;
    });
    const swatch = (step) => make("span", { class: `swatch rarity-${step}` });
    // Five steps of rarity; eight colours for clusters, so that neighbours may share one.
    const has = (name) => points.some(([item]) => data.samples[item][name] !== undefined);
    const rarityOf = (sample) => (sample.scores || {}).rarity;
    const COLOURINGS = {
      verdict: [true, (sample) => (sample.keep ? "kept" : "dropped"), []],
      rarity: [
        points.some(([item]) => rarityOf(data.samples[item]) !== undefined),
        (sample) => {
          const value = rarityOf(sample);
          return value === undefined ? "plain" : `rarity-${Math.min(4, Math.floor(value * 5))}`;
        },
        ["common ", ...[0, 1, 2, 3, 4].map(swatch), " rare"],
      ],
      cluster: [
        has("cluster"),
        (sample) => (sample.cluster === undefined ? "plain" : `cluster-${sample.cluster % 8}`),
        ["one colour per cluster of copies; grey: no copies"],
      ],
    };
    function colour(chosen) {
      const [, kind, told] = COLOURINGS[chosen];
      points.forEach(([item], number) => {
        const at = marks[number].classList.contains("at") ? " at" : "";
        marks[number].setAttribute("class", `dot ${kind(data.samples[item])}${at}`);
      });
      find("scale").replaceChildren(...told);
      find("map").dataset.colour = chosen;
      for (const button of find("colours").children) {
        button.setAttribute("aria-pressed", String(button.textContent === chosen));
      }
    }
    for (const [name, [isThere]] of Object.entries(COLOURINGS)) {
      if (!isThere) continue;
      const button = make("button", { type: "button" }, name);
      button.addEventListener("click", () => colour(name));
      find("colours").append(button);
    }
    colour("verdict");
    // The few that were dropped lie on top.
    plane.append(...marks.filter((_, number) => isKept(points[number])));
    plane.append(...marks.filter((_, number) => !isKept(points[number])));
    let at = -1;
    function go(next) {
      const place = Math.max(0, Math.min(points.length - 1, next));
      if (place === at) return;
      if (at >= 0) marks[at].classList.remove("at");
      at = place;
      marks[at].classList.add("at");
      plane.append(marks[at]);
      find("here").replaceChildren(card(data.samples[points[at][0]]));
    }
    // The nearest dot to the pointer: dots are too small to hit with a finger.
    plane.addEventListener("pointermove", (event) => {
      const box = plane.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * 360 - 8;
      const y = ((event.clientY - box.top) / box.height) * 270 - 8;
      let best = 0;
      let least = Infinity;
      points.forEach(([, right, down], number) => {
        const distance = (right * 344 - x) ** 2 + (down * 254 - y) ** 2;
        if (distance < least) [best, least] = [number, distance];
      });
      go(best);
    });
    plane.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      go(at + step);
    });
    go(Math.floor(points.length / 2));
  }
  if (data.map) drawMap();

  // Regions of the density: click, drag, or arrow keys and Enter.
  function listenToRegions() {
    const regions = [...find("regions").children];
    const side = Math.sqrt(regions.length);
    const isChosen = (region) => region.getAttribute("aria-pressed") === "true";
    let paints = true;
    function choose(region, on) {
      region.setAttribute("aria-pressed", String(on));
      const chosen = regions.flatMap((one, number) => (isChosen(one) ? [number] : []));
      const sum = (place) =>
        chosen.reduce((total, number) => total + data.density.regions[number][place], 0);
      const items = chosen.flatMap((number) => data.density.shown[number]);
      const told = `${count(sum(0))} samples, ${count(sum(1))} dropped`;
      const title = items.length < sum(0) ? `${told}; ${items.length} of them shown here` : told;
      find("region").replaceChildren(
        ...(chosen.length ? [make("h3", {}, title), grid(items, {})] : []),
      );
    }
    regions.forEach((region, number) => {
      region.addEventListener("pointerdown", (event) => {
        region.releasePointerCapture(event.pointerId);
        paints = !isChosen(region);
        choose(region, paints);
      });
      region.addEventListener("pointerenter", (event) => {
        if (event.buttons & 1 && isChosen(region) !== paints) choose(region, paints);
      });
      region.addEventListener("keydown", (event) => {
        const step = { ArrowRight: side, ArrowLeft: -side, ArrowUp: 1, ArrowDown: -1 }[event.key];
        if (step) {
          const next = regions[number + step];
          if (next) {
            region.setAttribute("tabindex", "-1");
            next.setAttribute("tabindex", "0");
            next.focus();
          }
        } else if (event.key === "Enter" || event.key === " ") choose(region, !isChosen(region));
        else return;
        event.preventDefault();
      });
    });
  }
  if (data.density) listenToRegions();

  // The slider.
  const curve = data.curve;
  if (!curve) return;
  const slider = find("rate");

  function figure(title, value, behind) {
    return make("div", {}, make("dt", {}, title), make("dd", {}, value, make("small", {}, behind)));
  }

  function move() {
    const point = curve.points[Number(slider.value)];
    const setting = `--set select.max_mismatch_rate=${point.setting}`;
    find("setting").textContent = setting;
    slider.setAttribute("aria-valuetext", `${point.setting}: ${count(point.kept)} kept`);
    const about = point.wider ? "about " : "";
    find("figures").replaceChildren(
      figure("kept", about + count(point.kept), percent(point.kept / curve.ingested)),
      figure("expected mismatched", percent(point.expected, 2), "among the kept"),
      figure("rare lost", percent(point.rare_lost), "of rare samples with a score"),
      figure("common lost", percent(point.common_lost), "of the others"),
      ...("random" in point.caught
        ? [
            figure(
              "planted captions caught",
              percent(point.caught.random),
              `${percent(point.caught.near_image)} of look-alikes'`,
            ),
          ]
        : []),
    );
    for (const mark of document.querySelectorAll("#rates .mark")) {
      const x = mark.dataset.stops.split(" ")[Number(slider.value)];
      mark.setAttribute("x1", x);
      mark.setAttribute("x2", x);
    }
    const score = (item) => data.samples[item].scores.mismatch_probability;
    // Both were rounded to six digits.
    const isBelow = (item) => score(item) <= point.limit * (1 + 1e-5);
    const below = curve.ladder.filter(isBelow);
    const above = curve.ladder.filter((item) => !isBelow(item));
    const sides = [
      [`below the line (${point.told})`, below.slice(-LADDER_SIDE).reverse(), true],
      ["above the line: would be dropped", above.slice(0, LADDER_SIDE), false],
    ];
    find("ladder").replaceChildren(
      make(
        "div",
        { class: "beside" },
        ...sides.map(([label, items, isKept]) =>
          make(
            "div",
            { class: "group" },
            make("h4", {}, label),
            items.length
              ? grid(items, { isAlone: true, isKept, scores: ["mismatch_probability", "rarity"] })
              : make("p", {}, "none of the samples shown here"),
          ),
        ),
      ),
    );
  }
  slider.addEventListener("input", move);
  move();
})();
