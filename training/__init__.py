"""How the models that ship with Swapless were trained; nothing in the installed package imports this."""
