"""What a browser, or a client that looks whether anybody is there, sees: `/`, `/docs` and `/openapi.json`."""

import html
import threading
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from kvist.base.version import __version__

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#222;background:#fff}"
    "h2{margin-top:2rem}code{font-size:.9em}td{padding:.15rem 1rem .15rem 0;vertical-align:top}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}a{color:#8bf}}"
)
# The page runs nothing and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_METHODS = ("get", "post", "put", "delete")


def add_pages(app: FastAPI, name: str) -> None:
    """Add them. `name`: of the model."""
    describing = threading.Lock()

    def description() -> dict[str, Any]:
        with describing:  # it is made once, and that takes a second
            return app.openapi()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False, response_class=PlainTextResponse)
    async def root() -> Response:
        return PlainTextResponse(f"Kvist {__version__} serves {name}: /docs lists the routes.\n")

    # Neither is `async`, so they run on threads of their own.
    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    def docs() -> Response:
        return HTMLResponse(page(description()), headers={"content-security-policy": _POLICY})

    @app.get("/openapi.json", include_in_schema=False, response_class=JSONResponse)
    def openapi() -> Response:
        return JSONResponse(description())


def page(description: Mapping[str, Any]) -> str:
    """The routes of an OpenAPI description by their tags, each with what it does and the fields of its body."""
    sections: dict[str, list[str]] = {}
    for path, operations in description["paths"].items():
        for method in _METHODS:
            if method not in operations:
                continue
            operation = operations[method]
            words = operation.get("description") or operation.get("summary", "")
            fields = ", ".join(f"<code>{html.escape(field)}</code>" for field in _fields(operation, description))
            row = f"<tr><td><code>{method.upper()}&nbsp;{html.escape(path)}</code></td><td>{html.escape(words)}"
            tag = operation.get("tags", ["Other"])[0]
            sections.setdefault(tag, []).append(f"{row}{'<br>' if fields else ''}{fields}</td></tr>")
    title = html.escape(f"{description['info']['title']} {description['info']['version']}")
    tables = (f"<h2>{html.escape(tag)}</h2><table>{''.join(rows)}</table>" for tag, rows in sections.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>"
        f'<body><h1>{title}</h1><p>All fields, with their types and bounds, are in <a href="openapi.json">'
        f"openapi.json</a>.</p>{''.join(tables)}</body></html>"
    )


def _fields(operation: Mapping[str, Any], description: Mapping[str, Any]) -> list[str]:
    """The names of the fields of its body."""
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return list(description.get("components", {}).get("schemas", {}).get(name, {}).get("properties", ()))
