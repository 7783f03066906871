"""Update rules as pure tensor functions: a formula each, no worker and no world."""
