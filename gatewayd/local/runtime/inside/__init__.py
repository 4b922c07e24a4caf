"""Programs that run beside and inside a sandbox.

They are started as files with ``python -I -S`` (no site-packages, no environment), so they import the standard library and their
neighbours only, and everything they will ever need before they enter the sandbox: after that the host's files are out of sight.
"""
