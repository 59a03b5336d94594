"""Installed as `rewrite.patterns`."""

if __name__ != "rewrite.patterns":
    raise ImportError("import 'rewrite.patterns', not 'patterns': the folder is installed as a part of the package rewrite")
