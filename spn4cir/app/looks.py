"""Style sheet and scripts of the page; neither names another server."""

STYLE = """
.gradio-container{width:100%!important;max-width:1280px!important;margin:0 auto!important;box-sizing:border-box;
 padding:12px 16px!important}
.gradio-container>.main{padding:0!important}
.gradio-container .html-container{padding:0!important}
.spn-head h1{font-size:1.4rem;font-weight:600;margin:0}
.spn-head a{text-decoration:underline}
.spn-head p{margin:.2rem 0 0;color:var(--body-text-color-subdued)}
.spn-button,.spn-lean button,.spn-chips button,.spn-trail li button{border:1px solid var(--border-color-primary);
 background:var(--button-secondary-background-fill);color:var(--body-text-color);border-radius:8px;cursor:pointer;
 min-height:36px;padding:4px 12px;font-size:.9rem;display:inline-flex;align-items:center;gap:6px}
.spn-button:hover,.spn-lean button:hover,.spn-chips button:hover,.spn-trail button:hover{
 border-color:var(--color-accent)}
.spn-notice{border:1px solid #d97706;background:#f59e0b22;border-radius:8px;padding:8px 12px;margin:0 0 10px;
 overflow-wrap:anywhere}
.spn-trail{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin-bottom:10px}
.spn-trail ol{display:flex;flex-wrap:nowrap;gap:6px;overflow-x:auto;list-style:none;margin:0;padding:2px;max-width:100%}
.spn-trail li{display:flex;align-items:center;flex:none;list-style:none}
.spn-trail li+li::before{content:"›";margin-right:6px;color:var(--body-text-color-subdued)}
.spn-trail li button{max-width:220px;white-space:nowrap;overflow:hidden;padding:3px 8px}
.spn-trail li button span{overflow:hidden;text-overflow:ellipsis;min-width:0}
.spn-trail li button b{flex:none;font-weight:600}
.spn-trail li button img{flex:none;width:28px;height:28px;object-fit:contain;background:#fff;border-radius:4px}
.spn-trail [aria-current]{border-color:var(--color-accent)!important;box-shadow:inset 0 0 0 1px var(--color-accent)}
.spn-query{display:flex;flex-wrap:wrap;gap:14px;align-items:center}
.spn-empty{color:var(--body-text-color-subdued);padding:14px;border:1px dashed var(--border-color-primary);
 border-radius:8px;flex:1 1 220px}
.spn-reference{display:flex;gap:12px;align-items:center;margin:0}
.spn-reference img{width:112px;height:112px;object-fit:contain;background:#fff;border-radius:8px;
 border:1px solid var(--border-color-primary)}
.spn-reference figcaption{display:flex;flex-direction:column;gap:4px;align-items:flex-start;max-width:240px;
 overflow-wrap:anywhere;color:var(--body-text-color-subdued);font-size:.85rem}
.spn-reference b{color:var(--body-text-color);font-size:1rem;font-weight:600}
.spn-chips{display:flex;gap:6px;align-items:center;flex-wrap:wrap}
.spn-chips b{font-weight:600;font-size:.9rem}
.spn-chips button{padding:3px 8px}
.spn-chips img{width:32px;height:32px;object-fit:contain;background:#fff;border-radius:4px}
.spn-hits h2{font-size:1rem;font-weight:600;margin:4px 0 10px;overflow-wrap:anywhere}
.spn-say{display:flex;flex-wrap:wrap;gap:6px;align-items:center;margin:0 0 12px;
 color:var(--body-text-color-subdued)}
.spn-grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:12px}
.spn-card{margin:0;border:1px solid var(--border-color-primary);border-radius:10px;overflow:hidden;
 background:var(--block-background-fill);display:flex;flex-direction:column;min-width:0}
.spn-pick{position:relative;border:0;padding:0;background:#fff;cursor:pointer;aspect-ratio:1;width:100%;display:block;
 color:#333}
.spn-pick img{width:100%;height:100%;object-fit:contain;padding:10px;margin:0}
.spn-pick:hover img{transform:scale(1.04)}
.spn-pick:focus-visible,.spn-button:focus-visible,.spn-lean button:focus-visible{outline:3px solid var(--color-accent);
 outline-offset:-3px}
.spn-score{position:absolute;right:6px;top:6px;background:#000a;color:#fff;border-radius:6px;padding:1px 6px;
 font-size:.75rem;font-variant-numeric:tabular-nums}
.spn-card figcaption{font-size:.82rem;line-height:1.25;padding:6px 8px;min-height:calc(2.5em + 12px);
 overflow-wrap:anywhere;color:var(--body-text-color)}
.spn-card figcaption span{display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow:hidden}
.spn-lean{display:flex;border-top:1px solid var(--border-color-primary);margin-top:auto}
.spn-lean button{flex:1;border:0;border-radius:0;background:none;justify-content:center;padding:4px;gap:3px;
 white-space:nowrap;color:var(--body-text-color-subdued)}
.spn-lean button+button{border-left:1px solid var(--border-color-primary)}
.spn-lean [aria-pressed=true]{background:var(--color-accent);color:#fff}
.spn-upload{display:flex;flex-wrap:wrap;gap:10px;align-items:center;border:1px dashed var(--border-color-primary);
 border-radius:8px;padding:10px}
.spn-upload.over{border-color:var(--color-accent)}
.spn-upload span{color:var(--body-text-color-subdued);font-size:.9rem}
.spn-upload label{position:relative;gap:0}
.spn-upload input{position:absolute;opacity:0;width:1px;height:1px}
.spn-upload label:focus-within{outline:3px solid var(--color-accent)}
.spn-sketch{margin-top:8px}
.spn-sketch summary{cursor:pointer;padding:8px 0;color:var(--body-text-color)}
.spn-sketch canvas{background:#fff;border:1px solid var(--border-color-primary);border-radius:8px;touch-action:none;
 width:min(320px,100%);aspect-ratio:1;cursor:crosshair;display:block;margin-bottom:8px}
@media (hover:none){.spn-upload span{display:none}}
@media (max-width:600px){
 .spn-reference img{width:80px;height:80px}
 .spn-grid{grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:8px}
 .spn-lean button{min-height:40px;padding:4px 1px;font-size:.82rem}
 .spn-head h1{font-size:1.2rem}
}
"""

ACTIONS = """
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-action]');
  if (!chosen) return;
  if (['pick', 'turn', 'back', 'restart', 'say'].includes(chosen.dataset.action))
    window.scrollTo({top: 0, behavior: 'smooth'});
  trigger('click', {...chosen.dataset});
});
watch('value', () => {
  const trail = element.querySelector('.spn-trail ol');
  if (trail) trail.scrollLeft = trail.scrollWidth;
});
"""
"""Of a part of the page whose buttons name their actions."""

UPLOAD = """
const send = async (picture, source) => {
  const fail = (message) => trigger('click', {action: 'problem', message});
  if (picture.size > MOST_BYTES) return fail('TOO_LARGE');
  try {
    const answer = await fetch(new URL('upload', document.baseURI), {method: 'POST', body: picture});
    const reply = await answer.json().catch(() => ({message: `the upload failed with status ${answer.status}`}));
    if (!answer.ok) return fail(reply.message);
    trigger('click', {action: 'upload', token: reply.token, title: source});
  } catch (error) {
    fail('the server does not answer');
  }
};
const input = element.querySelector('input'), box = element.querySelector('.spn-upload');
input.addEventListener('change', () => {
  if (input.files.length) send(input.files[0], input.files[0].name);
  input.value = '';
});
box.addEventListener('dragover', (event) => { event.preventDefault(); box.classList.add('over'); });
box.addEventListener('dragleave', () => box.classList.remove('over'));
box.addEventListener('drop', (event) => {
  event.preventDefault();
  box.classList.remove('over');
  if (event.dataTransfer.files.length) send(event.dataTransfer.files[0], event.dataTransfer.files[0].name);
});
const canvas = element.querySelector('canvas');
if (canvas) {
  const paper = canvas.getContext('2d');
  let isEmpty = true;
  const clear = () => { isEmpty = true; paper.fillStyle = 'white'; paper.fillRect(0, 0, canvas.width, canvas.height); };
  const place = (event) => {
    const area = canvas.getBoundingClientRect();
    return [(event.clientX - area.left) * canvas.width / area.width,
            (event.clientY - area.top) * canvas.height / area.height];
  };
  clear();
  paper.lineWidth = 5;
  paper.lineCap = paper.lineJoin = 'round';
  let isDrawing = false;
  canvas.addEventListener('pointerdown', (event) => {
    isDrawing = true;
    isEmpty = false;
    canvas.setPointerCapture(event.pointerId);
    paper.beginPath();
    paper.moveTo(...place(event));
    paper.lineTo(...place(event));
    paper.stroke();
  });
  canvas.addEventListener('pointermove', (event) => {
    if (isDrawing) { paper.lineTo(...place(event)); paper.stroke(); }
  });
  canvas.addEventListener('pointerup', () => { isDrawing = false; });
  element.querySelector('[data-sketch=clear]').addEventListener('click', clear);
  element.querySelector('[data-sketch=use]').addEventListener('click', () => {
    if (isEmpty) trigger('click', {action: 'problem', message: 'draw something first'});
    else canvas.toBlob((picture) => send(picture, 'sketch'), 'image/png');
  });
}
"""
"""Of the part that uploads a file or a sketch."""

UPLOAD_PART = """<div class="spn-upload">
<label class="spn-button">Upload a picture<input type="file" accept="image/*"></label>
<span>or drop one here</span></div>"""
SKETCH_PART = """<details class="spn-sketch"><summary>Draw a sketch</summary><canvas width="384" height="384"></canvas>
<button class="spn-button" data-sketch="use">Search by the sketch</button>
<button class="spn-button" data-sketch="clear">Clear</button></details>"""
