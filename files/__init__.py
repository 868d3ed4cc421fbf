"""Files written whole, untrusted JSON read strictly, paths that come from outside."""
