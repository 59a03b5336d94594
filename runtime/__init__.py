"""Installed as `rewrite.runtime`."""

if __name__ != "rewrite.runtime":
    raise ImportError("import 'rewrite.runtime', not 'runtime': the folder is installed as a part of the package rewrite")
