"""A federation on a simulated clock: what rounds would take on stated devices and links."""
