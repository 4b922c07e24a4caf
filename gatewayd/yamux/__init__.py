"""yamux: many byte streams over one connection. `frames`, `stream`, `session` are pure; `aio` drives them."""
