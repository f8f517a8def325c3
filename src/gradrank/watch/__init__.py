"""How a run looks at gradients for its course, and turns a decision into edits."""
