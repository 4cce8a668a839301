"""The HTTP server: OpenAI's, Anthropic's and AstrAI's interfaces over one `Engine`. Extra `server`.

>>> from astrai_rs import Engine
>>> from astrai_rs.server import create_app
>>> app = create_app(Engine("path/to/model"))                  # doctest: +SKIP

Reading order: `settings`, `errors`, `middleware` (what every request passes), `generation` (requests to
the engine), `sampling`, `chat` and `completions` (wire types and pure converters), `app` (routes), `serve`.
"""

from astrai_rs.server.app import create_app as create_app
from astrai_rs.server.settings import ServerSettings as ServerSettings
