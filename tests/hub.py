"""A server on this machine that speaks the Hub's URLs, over folders: `datasets` and `huggingface_hub` cannot tell the difference."""
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = '0123456789abcdef0123456789abcdef01234567'   # of every repository, at every revision

class Handler(BaseHTTPRequestHandler):
    "`server.repos`: (kind, name) → folder; `server.asked`: every request's line."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def reply(self, code, body=b'', kind='application/json', **headers):
        self.send_response(code)
        headers = {'Content-Type':kind, 'Content-Length':str(len(body)), **headers}
        for name,value in headers.items(): self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)

    def as_json(self, x): self.reply(200, json.dumps(x).encode())

    def entry(self, folder, path):
        data = path.read_bytes()
        oid = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
        return dict(type='file', path=str(path.relative_to(folder)), size=len(data), oid=oid)

    def files(self, folder): return [self.entry(folder, p) for p in sorted(folder.rglob('*')) if p.is_file()]

    def do_HEAD(self): self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0))).decode()
        self.server.asked.append(f'POST {self.path}')
        m = re.fullmatch(r'/api/(datasets|models)/([^/]+/[^/]+)/paths-info/[^/]+', unquote(urlsplit(self.path).path))
        folder = m and self.server.repos.get((m[1], m[2]))
        if not folder: return self.reply(404, b'{"error": "not here"}', X_Error_Code='EntryNotFound')
        asked = json.loads(body)['paths'] if body.startswith('{') else parse_qs(body).get('paths', [])
        self.as_json([f for f in self.files(folder) if f['path'] in asked])

    def do_GET(self):
        self.server.asked.append(f'{self.command} {self.path}')
        path = unquote(urlsplit(self.path).path)
        if m := re.fullmatch(r'/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
            folder = self.server.repos.get(('datasets' if m[1] else 'models', m[2]))
            if not folder: return self.reply(404, b'', X_Error_Code='RepoNotFound')
            file = folder/m[4]
            if not file.is_file(): return self.reply(404, b'', X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT)
            tag = f'"{self.entry(folder, file)["oid"]}"'
            return self.reply(200, file.read_bytes(), 'application/octet-stream', ETag=tag, X_Repo_Commit=COMMIT, Accept_Ranges='bytes')
        if m := re.fullmatch(r'/api/(datasets|models)/([^/]+/[^/]+)(/revision/[^/]+)?', path):
            folder = self.server.repos.get((m[1], m[2]))
            if not folder: return self.reply(404, b'{"error": "Repository not found"}', X_Error_Code='RepoNotFound')
            files = [dict(rfilename=f['path'], size=f['size'], blobId=f['oid']) for f in self.files(folder)]
            state = dict(private=False, gated=False, disabled=False, tags=[], downloads=0, likes=0)
            when = dict.fromkeys(('lastModified', 'createdAt'), '2026-01-01T00:00:00.000Z')
            return self.as_json(dict(_id='1', id=m[2], sha=COMMIT, siblings=files, **state, **when))
        if m := re.fullmatch(r'/api/(datasets|models)/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?', path):
            folder = self.server.repos.get((m[1], m[2]))
            top = folder and folder/(m[3] or '')
            if not top or not top.is_dir(): return self.reply(404, b'{"error": "not here"}', X_Error_Code='EntryNotFound')
            deep = parse_qs(urlsplit(self.path).query).get('recursive', ['false'])[0].lower()=='true'
            found = sorted(top.rglob('*') if deep else top.iterdir())
            def folder_entry(p):
                oid = hashlib.sha1(str(p).encode()).hexdigest()
                return dict(type='directory', path=str(p.relative_to(folder)), size=0, oid=oid)
            return self.as_json([folder_entry(p) if p.is_dir() else self.entry(folder, p) for p in found])
        self.reply(404, b'{"error": "not here"}')

@contextmanager
def hub(repos):  # {('datasets', 'openai/gsm8k'): folder, …} → the server; its address is `server.url`
    "Serve folders as repositories for as long as the context lasts."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.repos = {key: Path(folder) for key,folder in repos.items()}
    server.asked = []
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server
    finally: server.shutdown()
