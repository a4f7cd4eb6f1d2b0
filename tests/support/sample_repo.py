"""A git repository of a few dozen documented functions, and its history: the data of retrainings in tests."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

FIRST_MODULES: Mapping[str, Mapping[str, str]] = {
    "heating.py": {
        "warm_up": "Raise the temperature of a room before somebody comes home.",
        "cool_down": "Lower the temperature of a room when its windows are open.",
        "plan_the_night": "Choose how warm each bedroom is kept until the morning.",
    },
    "lights.py": {
        "dim_slowly": "Dim the lights of a room over half an hour.",
        "follow_the_sun": "Set the colour of all lamps by the height of the sun.",
        "blink_for_doorbell": "Blink the lamp above the stairs when the doorbell rings.",
    },
    "garden.py": {
        "water_the_beds": "Water the vegetable beds unless it has rained today.",
        "count_hedgehogs": "Count the hedgehogs that the camera saw in the last night.",
        "close_greenhouse": "Close the roof of the greenhouse before a storm.",
    },
    "kitchen.py": {
        "list_groceries": "List what is missing in the pantry for the meals of a week.",
        "preheat_oven": "Heat the oven so that it is ready when the dough is.",
        "warn_of_open_fridge": "Say aloud that the door of the fridge has been open for long.",
    },
    "mail.py": {
        "sort_letters": "Sort scanned letters into folders by who has sent them.",
        "remind_of_bills": "Remind everybody of bills that are due within three days.",
        "archive_old": "Move letters of past years into the archive on the tape.",
    },
}
"""By file name: its functions and their docstrings."""

LATER_MODULES: Mapping[str, Mapping[str, str]] = {
    "music.py": {
        "wake_with_birds": "Play the song of a blackbird louder and louder until somebody is up.",
        "move_with_me": "Let the music follow a person from room to room.",
        "quiet_for_calls": "Turn the music down while anybody is on the telephone.",
    },
    "doors.py": {
        "lock_at_ten": "Lock the front door at ten, unless a guest is expected.",
        "open_for_parcel": "Open the box at the gate for a parcel that was announced.",
        "count_keys": "Count the keys on the board and name those who have one.",
    },
    "energy.py": {
        "charge_at_noon": "Charge the car while the panels on the roof give the most.",
        "sell_surplus": "Sell to the grid what the battery cannot take any more.",
        "find_standby": "Find the devices that take power although nobody uses them.",
    },
    "pets.py": {
        "feed_the_cat": "Fill the bowl of the cat twice a day, but never when it was just filled.",
        "weigh_the_cat": "Note the weight of the cat whenever it steps onto its mat.",
        "call_the_dog": "Play the whistle that the dog knows through the speaker in the garden.",
    },
    "weather.py": {
        "take_in_laundry": "Warn that rain will come before the laundry is dry.",
        "shade_the_rooms": "Lower the blinds of rooms that the sun would make too hot.",
        "clear_the_snow": "Order the robot to clear the path when snow lies on it.",
    },
}


class SampleRepo:
    """A git repository whose commits add modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "user.name", "Somebody")
        self.git("config", "user.email", "somebody@example.com")

    def git(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        command = ["git", "-C", str(self.folder), *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, modules: Mapping[str, Mapping[str, str]], environment: Mapping[str, str] | None = None) -> None:
        """Make a commit for each module. Hooks run."""
        for name, functions in modules.items():
            (self.folder / name).write_text(source(functions))
            self.git("add", name)
            self.git("commit", "--quiet", "--message", f"Add {name}: {', '.join(functions)}", environment=environment)


def source(functions: Mapping[str, str]) -> str:
    return "\n\n".join(
        f'def {name}(house):\n    """{docstring}"""\n    return house.run("{name}")\n'
        for name, docstring in functions.items()
    )
