// The few signs on buttons, drawn in strokes on a field of 16 by 16.

const PATHS = {
  copy: "M5.5 5.5V3.2c0-.4.3-.7.7-.7h6.6c.4 0 .7.3.7.7v6.6c0 .4-.3.7-.7.7h-2.3M3.2 5.5h6.6c.4 0 .7.3.7.7v6.6c0 .4-.3.7-.7.7H3.2a.7.7 0 0 1-.7-.7V6.2c0-.4.3-.7.7-.7z",
  check: "M3 8.5l3.2 3.2L13 4.8",
  edit: "M10.8 2.8l2.4 2.4L5.6 12.8l-3 .6.6-3zM9.3 4.3l2.4 2.4",
  retry: "M13 8a5 5 0 1 1-1.5-3.6M13 2.5v2.6h-2.6",
  previous: "M9.8 3.8L5.6 8l4.2 4.2",
  next: "M6.2 3.8L10.4 8l-4.2 4.2",
  plus: "M8 3v10M3 8h10",
  menu: "M2.5 4.5h11M2.5 8h11M2.5 11.5h11",
  more: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  send: "M8 13V3.4M3.9 7.4L8 3.2l4.1 4.2",
  stop: "M4.5 4.5h7v7h-7z",
  down: "M8 3v9.6M3.9 8.6L8 12.8l4.1-4.2",
  settings: "M2.5 4.8h5.2M11.3 4.8h2.2M2.5 11.2h2.2M8.3 11.2h5.2M11.3 4.8a1.8 1.8 0 1 1-3.6 0 1.8 1.8 0 0 1 3.6 0zM8.3 11.2a1.8 1.8 0 1 1-3.6 0 1.8 1.8 0 0 1 3.6 0z",
  light: "M10.6 8a2.6 2.6 0 1 1-5.2 0 2.6 2.6 0 0 1 5.2 0zM8 1.8v1.4M8 12.8v1.4M1.8 8h1.4M12.8 8h1.4M3.6 3.6l1 1M11.4 11.4l1 1M3.6 12.4l1-1M11.4 4.6l1-1",
  dark: "M13 9.5A5.6 5.6 0 0 1 6.5 3a5.3 5.3 0 1 0 6.5 6.5z",
  system: "M2.5 3.2h11v7.6h-11zM6 13.2h4",
  close: "M4 4l8 8M12 4l-8 8",
};

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {keyof typeof PATHS} name
 * @returns {SVGSVGElement} to be hidden from those who listen: the button around it has a label
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon", `icon-${name}`);
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}
