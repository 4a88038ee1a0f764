"use strict";
// Replaces each picture by an interactive chart when it comes into view. Whatever fails leaves the picture in place.
(async () => {
  const read = (id) => document.getElementById(id).textContent;
  const figures = JSON.parse(read("figures"));
  const colors = JSON.parse(read("colors"));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Where there is none, dragging scrolls the page
  const mouse = matchMedia("(hover: hover) and (pointer: fine)");

  async function loadLibrary() {
    const packed = Uint8Array.from(atob(read("plotly")), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    if (!window.Plotly) throw new Error("plotly did not load");
  }

  // "@name" and "@name/alpha" become colours of the page's theme
  function resolve(value, palette) {
    if (typeof value === "string" && value.startsWith("@")) {
      const [name, alpha] = value.slice(1).split("/");
      return name in palette ? palette[name] + (alpha || "") : value;
    }
    if (Array.isArray(value)) return value.map((entry) => resolve(entry, palette));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, TEXTS.has(key) ? entry : resolve(entry, palette)]));
    }
    return value;
  }
  // What users wrote is never a colour
  const TEXTS = new Set(["name", "text", "ticktext", "legendgroup", "hovertemplate"]);

  function draw(plot) {
    const palette = colors[dark.matches ? "dark" : "light"];
    const figure = resolve(figures[plot.dataset.chart], palette);
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: palette.text };
    const layout = {
      ...figure.layout,
      font,
      autosize: true,
      margin: { l: 56, r: 14, t: 24, b: 44 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: palette.muted, activecolor: palette.accent },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      dragmode: mouse.matches ? "zoom" : false,
      hoverlabel: { bgcolor: palette.raised, bordercolor: palette.border, font: { color: palette.text } },
      legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom", itemwidth: 30 },
    };
    const config = { responsive: true, displaylogo: false, displayModeBar: mouse.matches ? "hover" : false,
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
    let drawing = plot.querySelector(".drawing");
    if (!drawing) {
      drawing = document.createElement("div");
      drawing.className = "drawing";
      plot.append(drawing);
      plot.classList.add("live");
    }
    return window.Plotly.react(drawing, figure.data, layout, config).catch((error) => {
      drawing.remove();
      plot.classList.remove("live");
      console.warn(error);
    });
  }

  try {
    await loadLibrary();
  } catch (error) {
    console.warn("The charts stay pictures:", error);
    return;
  }
  const drawn = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      drawn.add(target);
      draw(target);
    }
  }, { rootMargin: "600px" });
  // A turned phone, a wider window: plotly's own watch misses changes of the page's layout
  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const drawing = target.querySelector(".drawing.js-plotly-plot");
      if (drawing && target.clientWidth) window.Plotly.Plots.resize(drawing);
    }
  });
  document.querySelectorAll(".plot").forEach((plot) => sizes.observe(plot));
  document.querySelectorAll(".plot").forEach((plot) => observer.observe(plot));
  dark.addEventListener("change", () => drawn.forEach(draw));
})();
