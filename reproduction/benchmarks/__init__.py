"""Measurements of speed, memory and the service under load; `report` makes the book's page of them."""
