"""Installed as `rewrite.plugins`."""

if __name__ != "rewrite.plugins":
    raise ImportError("import 'rewrite.plugins', not 'plugins': the folder is installed as a part of the package rewrite")
