// Colours by the reader's theme, the x-axis, and the faint curves before smoothing. Bokeh draws.
window.startReport = function (curves, results, range, ends) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)")
  const coarse = window.matchMedia("(pointer: coarse)").matches
  const titles = {step: "step", tokens: "tokens", hours: "hours of training"}
  const remembered = key => { try { return window.sessionStorage.getItem(key) } catch { return null } }
  const remember = (key, value) => { try { window.sessionStorage.setItem(key, value) } catch { /* not allowed */ } }

  function paint() {
    const style = window.getComputedStyle(document.documentElement)
    const color = name => style.getPropertyValue(name).trim()
    const text = color("--text"), muted = color("--muted"), grid = color("--grid")
    for (const chart of [...curves, ...results]) {
      chart.setv({outline_line_color: grid})
      chart.title.setv({text_color: text})
      for (const part of [...chart.above, ...chart.below, ...chart.left, ...chart.right, ...chart.center]) {
        if (part.type.endsWith("Axis")) {
          part.setv({axis_line_color: grid, major_tick_line_color: grid,
            major_label_text_color: muted, axis_label_text_color: muted})
        } else if (part.type == "Grid") {
          part.setv({grid_line_color: grid})
        } else if (part.type == "Legend") {
          part.setv({label_text_color: text, inactive_fill_color: color("--background"), inactive_fill_alpha: 0.7})
        }
      }
    }
  }

  function setAxis(axis) {
    for (const chart of curves) {
      for (const renderer of chart.renderers.filter(each => each.glyph)) {
        renderer.glyph.setv({x: {field: axis}})
      }
      chart.below[0].setv({axis_label: titles[axis]})
    }
    range.setv({start: 0, end: ends[axis], reset_start: 0, reset_end: ends[axis]})
  }

  function setRaw(visible) {
    for (const chart of curves) {
      for (const renderer of chart.renderers.filter(each => each.name == "raw")) {
        renderer.glyph.setv({line_alpha: visible ? 0.3 : 0})
      }
    }
  }

  paint()
  dark.addEventListener("change", paint)
  if (coarse) { // a finger scrolls the page
    for (const chart of curves) { chart.toolbar.gestures.pan.active = null }
  }
  const axis = document.getElementById("axis"), raw = document.getElementById("raw")
  if (axis) {
    if (remembered("axis") in ends) { axis.value = remembered("axis") }
    raw.checked = remembered("raw") != "false"
    axis.addEventListener("change", () => { setAxis(axis.value); remember("axis", axis.value) })
    raw.addEventListener("change", () => { setRaw(raw.checked); remember("raw", raw.checked) })
    setAxis(axis.value)
    setRaw(raw.checked)
  }
  document.documentElement.dataset.ready = "true"
}
