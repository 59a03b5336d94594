"""Options that several commands have."""

from __future__ import annotations

import click

rules_option = click.option("--rules", "files", multiple=True, metavar="FILE", help="Python file of further rules and plugins (repeatable).")
key_option = click.option("--key", metavar="FILE", help="Of a plan: refuse it unless it is signed with this key (else that of $REWRITE_PLAN_KEY).")
