"""Installed as `rewrite.export`."""

if __name__ != "rewrite.export":
    raise ImportError("import 'rewrite.export', not 'export': the folder is installed as a part of the package rewrite")
