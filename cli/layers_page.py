"""The layers of a bundle as one self-contained page, to search and sort, light or dark."""

from __future__ import annotations

from html import escape

from ..profiles.report.html import document
from .layers import Layer, layers, summary
from .output import human_bytes, show
from .proofs import Proofs

_COLUMNS = (
    "engine", "component", "kind", "layer", "promised", "runs", "fused", "weight", "stored", "bits", "kernel",
    "why not in 8 bits",
)  # fmt: skip
_NUMBERS = frozenset({"weight", "stored", "bits"})
_CSS = """
:root{--card:light-dark(#f6f7f9,#1d2027);--low:light-dark(#0b6b3a,#5fd38d);--high:light-dark(#7a4a00,#e0b35a);
--bad:light-dark(#b42318,#ff8a80)}
main{max-width:1500px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:10px 14px}
.card h3{font-size:15px;margin:0 0 6px}dl{display:grid;grid-template-columns:auto 1fr;gap:2px 12px;margin:0;
font-size:13px}dt{color:var(--muted)}dd{margin:0}
.tools{display:flex;flex-wrap:wrap;gap:10px;margin:6px 0 10px;align-items:center}
input,select{font:inherit;color:inherit;background:var(--card);border:1px solid var(--grid);border-radius:6px;
padding:5px 9px}input{flex:1;min-width:220px}
.scroll{border:1px solid var(--grid);border-radius:8px}table{width:100%;margin:0}
th,td{padding:5px 10px;vertical-align:top;white-space:normal}
th{position:sticky;top:0;background:var(--card);padding:0}
th button{all:unset;cursor:pointer;padding:6px 10px;white-space:nowrap}
th button:focus-visible{outline:2px solid var(--s0)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
td.n,td.engine{white-space:nowrap}
td.mono{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:12px;overflow-wrap:anywhere}
td.name{min-width:330px}td.kernel{min-width:190px}td.why{min-width:260px}
.low{color:var(--low);font-weight:600}.high{color:var(--high);font-weight:600}
.bad{color:var(--bad);font-weight:600}
"""
_JS = """
const rows=[...document.querySelectorAll("tbody tr")],body=document.querySelector("tbody");
const search=document.getElementById("search"),count=document.getElementById("count");
const picks=[...document.querySelectorAll("select")];
function filter(){
  const words=search.value.toLowerCase().split(/\\s+/).filter(Boolean);let seen=0;
  for(const row of rows){
    const text=row.textContent.toLowerCase();
    const here=words.every(w=>text.includes(w))
      &&picks.every(p=>!p.value||row.cells[p.dataset.column].textContent===p.value);
    row.hidden=!here;seen+=here;
  }
  count.textContent=seen+" of "+rows.length+" layers";
}
for(const button of document.querySelectorAll("th button"))button.addEventListener("click",()=>{
  const head=button.parentElement,index=head.cellIndex;
  const down=head.getAttribute("aria-sort")==="ascending";
  for(const other of head.parentElement.cells)other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort",down?"descending":"ascending");
  const key=row=>row.cells[index].dataset.sort??row.cells[index].textContent;
  const order=new Intl.Collator(undefined,{numeric:true}).compare;
  rows.sort((a,b)=>(down?-1:1)*order(key(a),key(b)));body.append(...rows);
});
search.addEventListener("input",filter);picks.forEach(p=>p.addEventListener("change",filter));filter();
"""


def page(model: str, precision: str, reports: Proofs) -> str:
    """The whole HTML document of ``reports``."""
    title = f"Verified layers: {model} in {precision}"
    rows = "\n".join(
        _row(engine, component, layer)
        for engine, parts in reports.items()
        for component, proof in parts.items()
        for layer in layers(proof)
    )
    heads = "".join(
        f'<th scope="col"{" class=n" if name in _NUMBERS else ""}><button>{escape(name)}</button></th>'
        for name in _COLUMNS
    )
    return document(
        title,
        f"""<p>Each matrix product, convolution and attention of the graphs, as the engines run it: types of
both factors (input x weight), what is stored of the weight, and what one kernel does together.</p>
<h2>Engines</h2>
<div class="cards">{_cards(reports)}</div>
<h2>Layers</h2>
<div class="tools">
<input id="search" type="search" placeholder="Search: layers.0 fp8" aria-label="Search layers">
{_pick("engine", 0, list(reports))}
{_pick("component", 1, list(dict.fromkeys(c for parts in reports.values() for c in parts)))}
{_pick("kind", 2, ["product", "convolution", "attention", "cast"])}
<span id="count" role="status"></span>
</div>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></div>""",
        _CSS,
        _JS,
    )


def _cards(reports: Proofs) -> str:
    return "\n".join(
        f'<div class="card"><h3>{escape(component)} on {escape(engine)}</h3><dl>'
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in summary(proof.report).items())
        + "</dl></div>"
        for engine, parts in reports.items()
        for component, proof in parts.items()
    )


def _pick(name: str, column: int, values: list[str]) -> str:
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    first = f'<option value="">any {name}</option>'
    return f'<select data-column="{column}" aria-label="{name}">{first}{options}</select>'


def _row(engine: str, component: str, layer: Layer) -> str:
    bits = "" if layer.weight_bits is None else show(layer.weight_bits)
    stored = human_bytes(layer.weight_bytes) if layer.weight_bytes else ""
    cells = [
        _cell(engine, "engine"),
        _cell(component),
        _cell(layer.kind),
        _cell(layer.name, "mono name"),
        _cell(layer.promised),
        _cell(layer.runs, _tone(engine, layer)),
        _cell(layer.fused),
        _cell("x".join(map(str, layer.shape)), "n"),
        _cell(stored, "n", layer.weight_bytes),
        _cell(bits, "n", layer.weight_bits or 0),
        _cell(layer.kernel, "mono kernel"),
        _cell(layer.cause, "why"),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _cell(text: str, style: str = "", order: float | None = None) -> str:
    sort = "" if order is None else f' data-sort="{order:g}"'
    return f"<td{f' class={chr(34)}{style}{chr(34)}' if style else ''}{sort}>{escape(show(text))}</td>"


def _tone(engine: str, layer: Layer) -> str:
    """Green for 8 bits or less, amber for more, red for an expected precision that does not run.

    ONNX Runtime and torch have no FP8 kernels on a CPU: there FP8 is not expected of them.
    """
    kinds = set(layer.runs.split("x"))
    required = layer.promised == "int8" or (
        layer.promised == "fp8" and not engine.startswith(("onnxruntime", "torch-cpu"))
    )
    if required and kinds != {layer.promised}:
        return "bad"
    return "low" if kinds <= {"fp8", "int8", "int4"} else "high" if layer.runs else ""
