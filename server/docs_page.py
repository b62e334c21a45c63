"""The page at /docs: renders /openapi.json in the browser, with no file from anywhere else, so it works offline."""

DOCS_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Dinoscope API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
 details{border:1px solid #ccc;border-radius:6px;margin:.4rem 0;padding:.3rem .8rem}
 summary{cursor:pointer}
 code,pre{font:14px/1.4 ui-monospace,monospace;background:#f3f3f3;border-radius:4px;padding:.1rem .3rem}
 pre{padding:.6rem;overflow:auto}
 .method{display:inline-block;min-width:4.5rem;font-weight:700}
 table{border-collapse:collapse;margin:.5rem 0} td,th{border:1px solid #ddd;padding:.2rem .6rem;text-align:left}
 @media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}code,pre{background:#2a2a2a}
 details,td,th{border-color:#444}a{color:#8cf}}
</style></head><body>
<h1 id="title">Dinoscope API</h1><p id="about"></p>
<p>The machine-readable description is <a href="/openapi.json">/openapi.json</a>; metrics are at <a href="/metrics">/metrics</a>.</p>
<noscript>This page needs JavaScript to render the description.</noscript>
<div id="routes"></div>
<script>
const el = (tag, text, parent) => { const e = document.createElement(tag); if (text) e.textContent = text;
  if (parent) parent.append(e); return e; };
function example(method, path, operation) {
  const kinds = Object.keys(operation.requestBody?.content ?? {});
  const url = location.origin + path;
  const curl = operation.security ? `curl -H "authorization: Bearer $TOKEN"` : 'curl';
  if (kinds.includes('multipart/form-data')) return `${curl} -F file=@photo.jpg ${url}`;
  if (kinds.includes('application/json')) return `${curl} -H 'content-type: application/json' -d @request.json ${url}`;
  return method === 'get' ? `${curl} ${url}` : `${curl} -X ${method.toUpperCase()} ${url}`;
}
function resolve(api, schema) {
  while (schema?.$ref) schema = schema.$ref.slice(2).split('/').reduce((node, key) => node[key], api);
  return schema;
}
function show(api, path, method, operation, into) {
  const box = el('details', '', into), head = el('summary', '', box);
  el('span', method.toUpperCase(), head).className = 'method';
  el('code', path, head); el('span', '  ' + (operation.summary ?? ''), head);
  if (operation.description) el('p', operation.description, box);
  el('pre', example(method, path, operation), box);
  if (operation.parameters?.length) {
    const table = el('table', '', box), names = el('tr', '', table);
    for (const name of ['parameter', 'in', 'default', 'meaning']) el('th', name, names);
    for (const p of operation.parameters) { const row = el('tr', '', table);
      for (const cell of [p.name + (p.required ? ' *' : ''), p.in, JSON.stringify(p.schema?.default) ?? '',
        p.description ?? '']) el('td', cell, row); }
  }
  if (operation.requestBody) {
    el('p', 'Body: ' + (operation.requestBody.description ?? ''), box);
    for (const [kind, body] of Object.entries(operation.requestBody.content)) {
      el('code', kind, box);
      if (kind.includes('json')) el('pre', JSON.stringify(resolve(api, body.schema), null, 1), box);
      else el('br', '', box);
    }
  }
  const answers = el('table', '', box);
  for (const [status, answer] of Object.entries(operation.responses ?? {})) { const row = el('tr', '', answers);
    el('td', status, row); el('td', answer.description ?? '', row);
    el('td', Object.keys(answer.content ?? {}).join(', '), row); }
}
fetch('/openapi.json').then(answer => answer.json()).then(api => {
  document.getElementById('title').textContent = `${api.info.title} API ${api.info.version}`;
  document.getElementById('about').textContent = api.info.description;
  const groups = {};
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, operation] of Object.entries(methods)) {
    const tag = operation.tags?.[0] ?? 'other'; (groups[tag] ??= []).push([path, method, operation]); }
  const routes = document.getElementById('routes');
  for (const [tag, list] of Object.entries(groups)) { el('h2', tag, routes);
    for (const [path, method, operation] of list) show(api, path, method, operation, routes); }
});
</script></body></html>
"""
