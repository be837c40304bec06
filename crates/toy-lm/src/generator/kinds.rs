//! Documents of six kinds, with structure at every range: agreement within a phrase, counts and sums across a sentence,
//! places and owners across a paragraph, and a word that comes up again only at the end.

use super::words::{
    ANIMALS, COLOURS, CONTAINERS, FOODS, LOOKS, MEN, MOODS, OBJECTS, PLACES, ROLES, SECRETS, WOMEN,
};
use super::writer::Writer;

/// Largest number of things bought or counted at a time.
const MANY: usize = 12;

/// Writes one document.
pub(super) fn write(t: &mut Writer<'_>) {
    match t.choose(&[
        ("One ", 0.45),
        ("There were ", 0.15),
        ("Sums of ", 0.1),
        ("Who lives where? ", 0.15),
        ("A song of ", 0.1),
        ("In a row stood ", 0.05),
    ]) {
        0 => story(t),
        1 => animals(t),
        2 => sums(t),
        3 => houses(t),
        4 => song(t),
        _ => queue(t),
    }
    t.write("\n\n");
}

/// Somebody in a story.
struct Person {
    name: &'static str,
    she: bool,
    foods: usize,
}

impl Person {
    /// Writes a name that is not in use, and `after` it.
    fn new(t: &mut Writer<'_>, used: &[&str], after: &str) -> Self {
        // Women and men alternate, so that both are equally frequent.
        let names: Vec<&'static str> = WOMEN.iter().zip(&MEN).flat_map(|(w, m)| [*w, *m]).collect();
        let free: Vec<&'static str> = names.into_iter().filter(|n| !used.contains(n)).collect();
        let name = t.word(&free, after);
        Self {
            name,
            she: WOMEN.contains(&name),
            foods: 0,
        }
    }

    fn pronoun(&self) -> &'static str {
        if self.she { "She" } else { "He" }
    }
}

fn story(t: &mut Writer<'_>) {
    t.word(&["summer", "winter", "spring", "autumn"], " ");
    t.word(&["morning", "evening", "day", "night"], ", ");
    let finder = Person::new(t, &[], " the ");
    t.word(&ROLES, " found a ");
    t.word(&LOOKS, " ");
    let colour = t.word(&COLOURS, " ");
    let object = t.word(&OBJECTS, " near the ");
    let start = t.word(&PLACES, ". ");
    t.write(&format!("{} hid it in a ", finder.pronoun()));
    let container = t.word(&CONTAINERS, " and gave it a name: ");
    let secret = t.word(&SECRETS, ". ");
    t.write("Then came ");
    let friend = Person::new(t, &[finder.name], ", who was ");
    t.word(&MOODS, ". ");
    let mut people = [finder, friend];
    let mut place = start;
    loop {
        let (first, second) = (
            format!("{} ", people[0].name),
            format!("{} ", people[1].name),
        );
        let actor = t.choose(&[(&first, 0.45), (&second, 0.4), ("At last ", 0.15)]);
        if actor == 2 {
            break;
        }
        act(t, &mut people, actor, &mut place);
    }
    let [finder, friend] = people;
    t.write(&format!(
        "they went home from the {place}. {} took the {colour} {object} out of the {container}. \"What was its name?\" asked {}. \
         \"It is {secret},\" said {}.",
        finder.name, friend.name, finder.name
    ));
}

/// What one of two people does next.
fn act(t: &mut Writer<'_>, people: &mut [Person; 2], actor: usize, place: &mut &'static str) {
    let other = people[1 - actor].name;
    let name = people[actor].name;
    match t.choose(&[
        ("walked to the ", 0.25),
        ("bought ", 0.2),
        ("said, \"I am ", 0.2),
        ("saw some ", 0.15),
        ("sang about a ", 0.1),
        ("asked where they were. ", 0.1),
    ]) {
        0 => {
            let there = t.word(&PLACES, ", and ");
            t.write(&format!("{other} came along. "));
            *place = there;
        }
        1 => {
            let count = t.number(1, MANY, " ");
            let food = t.word(&FOODS, ". ");
            people[actor].foods += count;
            let eaten = t.number(1, count, " of them ");
            people[actor].foods -= eaten;
            t.write(&format!(
                "{} ate, and {} {food} were left. ",
                people[actor].pronoun().to_lowercase(),
                count - eaten
            ));
        }
        2 => {
            let mood = t.word(&MOODS, ".\" ");
            t.write(&format!("\"Why are you {mood}?\" asked {other}. "));
        }
        3 => {
            let animals = t.word(&ANIMALS, " ");
            t.write(&format!(
                "at the {place}. \"Look, {animals}!\" cried {name}. "
            ));
        }
        4 => {
            t.word(&LOOKS, " ");
            t.word(&OBJECTS, ". ");
        }
        _ => t.write(&format!("\"At the {place},\" said {other}. ")),
    }
}

fn animals(t: &mut Writer<'_>) {
    let mut count = t.number(1, MANY, " ");
    let animals = t.word(&ANIMALS, " at the ");
    let place = t.word(&PLACES, ". ");
    loop {
        // With none left nobody can leave, so the options depend on what the text says.
        let leave = if count > 0 { 0.35 } else { 0.0 };
        match t.choose(&[
            ("Then came ", 0.35),
            ("Away went ", leave),
            ("In the end ", 0.3),
        ]) {
            0 => {
                let more = t.number(1, MANY, ", ");
                count += more;
            }
            1 => {
                let fewer = t.number(1, count.min(MANY), ", ");
                count -= fewer;
            }
            _ => break,
        }
        t.write(&format!("and there were {count} {animals}. "));
    }
    t.write(&format!("{count} {animals} were at the {place}."));
}

fn sums(t: &mut Writer<'_>) {
    Person::new(t, &[], ": ");
    loop {
        let a = t.number(0, 20, " ");
        let result = match t.choose(&[("plus ", 0.6), ("minus ", 0.4)]) {
            0 => a + t.number(0, 20, " is "),
            _ => a - t.number(0, a, " is "),
        };
        t.write(&result.to_string());
        if t.choose(&[(", ", 0.8), (".", 0.2)]) == 1 {
            break;
        }
    }
}

fn houses(t: &mut Writer<'_>) {
    let mut homes: Vec<(&str, &str, &str)> = Vec::new();
    loop {
        let used: Vec<&str> = homes.iter().map(|(name, _, _)| *name).collect();
        let person = Person::new(t, &used, " lives in the ");
        let look = t.word(&LOOKS, " ");
        let colour = t.word(&COLOURS, " house");
        homes.push((person.name, look, colour));
        let end = if homes.len() < 8 { 0.25 } else { 1.0 };
        if t.choose(&[(". ", 1.0 - end), ("! Now tell me. ", end)]) == 1 {
            break;
        }
    }
    loop {
        t.write("Where does ");
        let names: Vec<&str> = homes.iter().map(|(name, _, _)| *name).collect();
        let asked = t.word(&names, " live? ");
        let home = homes.iter().find(|(name, _, _)| *name == asked);
        let (_, look, colour) = home.expect("the name is one of the list");
        t.write(&format!("In the {look} {colour} house."));
        if t.choose(&[(" ", 0.7), ("\n", 0.3)]) == 1 {
            break;
        }
    }
    t.write("That is all.");
}

fn song(t: &mut Writer<'_>) {
    Person::new(t, &[], ":\n");
    let mut lines = String::new();
    loop {
        let look = t.word(&LOOKS, " ");
        let animals = t.word(&ANIMALS, " at the ");
        let place = t.word(&PLACES, ",\n");
        lines += &format!("{look} {animals} at the {place},\n");
        if t.choose(&[("and ", 0.6), ("oh, oh!\n", 0.4)]) == 1 {
            lines += "oh, oh!\n";
            break;
        }
        lines += "and ";
    }
    loop {
        if t.choose(&[("Once more:\n", 0.6), ("That was the song.", 0.4)]) == 1 {
            break;
        }
        t.write(&lines);
    }
}

fn queue(t: &mut Writer<'_>) {
    let mut names: Vec<&str> = Vec::new();
    loop {
        let person = Person::new(t, &names, "");
        names.push(person.name);
        let end = match names.len() {
            1 | 2 => 0.0,
            3..7 => 0.3,
            _ => 1.0,
        };
        if t.choose(&[(", ", 1.0 - end), (". ", end)]) == 1 {
            break;
        }
    }
    loop {
        t.write("Who stood after ");
        let asked = t.word(&names[..names.len() - 1], "? ");
        let at = names.iter().position(|name| *name == asked);
        t.write(&format!(
            "{}.",
            names[at.expect("the name is one of the row") + 1]
        ));
        if t.choose(&[(" ", 0.6), ("\n", 0.4)]) == 1 {
            break;
        }
    }
    t.write(&format!(
        "The first was {}, the last was {}.",
        names[0],
        names[names.len() - 1]
    ));
}
