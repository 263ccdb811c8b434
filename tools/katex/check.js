// Reads [{tex, display}, ...] on stdin; writes {html} or, where KaTeX cannot set the equation, {error} for each.
const katex = require("katex");

function render({ tex, display }) {
  try {
    return { html: katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: "error" }) };
  } catch (error) {
    return { error: error.message };
  }
}

const equations = JSON.parse(require("fs").readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(equations.map(render)));
