"""SABnzbd's capabilities."""
