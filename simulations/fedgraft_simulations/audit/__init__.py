"""Privacy audits: parts that check what left, what it cost and what an attacker gets."""
