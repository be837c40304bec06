//! The words of the documents; those at the front of a list are the most frequent.

/// Names that go with "she".
pub(super) const WOMEN: [&str; 40] = [
    "Mira", "Anna", "Lotte", "Ida", "Nora", "Ella", "Greta", "Frida", "Clara", "Hanna", "Jana",
    "Lena", "Marta", "Olga", "Paula", "Rosa", "Selma", "Thea", "Vera", "Wanda", "Alma", "Berta",
    "Celia", "Dora", "Edith", "Flora", "Helga", "Irma", "Judith", "Kira", "Livia", "Magda",
    "Nelly", "Olive", "Petra", "Rita", "Sonja", "Tilda", "Ursula", "Yara",
];

/// Names that go with "he".
pub(super) const MEN: [&str; 40] = [
    "Otto", "Ben", "Emil", "Tom", "Jonas", "Karl", "Leo", "Max", "Nils", "Oskar", "Piet", "Rolf",
    "Sam", "Theo", "Udo", "Viktor", "Willy", "Anton", "Bruno", "Caspar", "David", "Erik", "Felix",
    "Georg", "Hugo", "Ivan", "Jakob", "Konrad", "Lukas", "Moritz", "Noah", "Pelle", "Quentin",
    "Robert", "Simon", "Tobias", "Uwe", "Vincent", "Walter", "Zeno",
];

/// Occupations.
pub(super) const ROLES: [&str; 20] = [
    "baker",
    "farmer",
    "teacher",
    "sailor",
    "painter",
    "gardener",
    "miller",
    "doctor",
    "tailor",
    "hunter",
    "singer",
    "writer",
    "shepherd",
    "carpenter",
    "fisher",
    "cook",
    "guard",
    "driver",
    "clerk",
    "smith",
];

/// Colours.
pub(super) const COLOURS: [&str; 16] = [
    "red", "blue", "green", "yellow", "white", "black", "brown", "grey", "golden", "silver",
    "pink", "orange", "purple", "copper", "violet", "cream",
];

/// Objects.
pub(super) const OBJECTS: [&str; 48] = [
    "ball", "key", "box", "book", "lamp", "ring", "stone", "coin", "shell", "hat", "cup", "bell",
    "mirror", "knife", "feather", "button", "rope", "flute", "drum", "kite", "map", "letter",
    "spoon", "candle", "scarf", "glove", "watch", "basket", "bottle", "chain", "mask", "doll",
    "clock", "brush", "pencil", "ladder", "anchor", "whistle", "umbrella", "lantern", "pillow",
    "compass", "hammer", "needle", "saddle", "wheel", "trumpet", "blanket",
];

/// Places.
pub(super) const PLACES: [&str; 40] = [
    "garden",
    "forest",
    "river",
    "market",
    "house",
    "school",
    "bridge",
    "lake",
    "hill",
    "barn",
    "mill",
    "harbour",
    "church",
    "tower",
    "meadow",
    "beach",
    "cave",
    "station",
    "library",
    "kitchen",
    "well",
    "castle",
    "orchard",
    "field",
    "valley",
    "island",
    "village",
    "bakery",
    "stable",
    "theatre",
    "museum",
    "square",
    "park",
    "pond",
    "cellar",
    "attic",
    "workshop",
    "lighthouse",
    "quarry",
    "vineyard",
];

/// Containers.
pub(super) const CONTAINERS: [&str; 12] = [
    "pocket", "drawer", "bag", "jar", "chest", "sack", "boot", "cupboard", "trunk", "crate",
    "bucket", "pouch",
];

/// Words that come up once and again only at the end of a document.
pub(super) const SECRETS: [&str; 60] = [
    "kestrel", "amber", "thistle", "comet", "marble", "willow", "ember", "falcon", "ginger",
    "harvest", "ivory", "jasper", "linden", "meteor", "nutmeg", "onyx", "pepper", "quartz",
    "raven", "saffron", "tulip", "velvet", "walnut", "yarrow", "zephyr", "acorn", "beacon",
    "clover", "dahlia", "echo", "fennel", "glacier", "hazel", "indigo", "juniper", "lagoon",
    "mango", "nectar", "opal", "plume", "ripple", "sorrel", "tempest", "umbra", "violin",
    "whisper", "almond", "bramble", "cinder", "drizzle", "elder", "fjord", "granite", "heron",
    "iris", "jade", "lotus", "mosaic", "nimbus", "otter",
];

/// Food, in the plural.
pub(super) const FOODS: [&str; 24] = [
    "apples", "nuts", "cakes", "plums", "eggs", "pears", "cherries", "carrots", "beans", "figs",
    "onions", "rolls", "grapes", "lemons", "peas", "melons", "berries", "olives", "turnips",
    "dates", "peaches", "buns", "radishes", "pies",
];

/// Animals, in the plural.
pub(super) const ANIMALS: [&str; 32] = [
    "dogs",
    "cats",
    "birds",
    "horses",
    "cows",
    "sheep",
    "goats",
    "ducks",
    "geese",
    "foxes",
    "rabbits",
    "mice",
    "frogs",
    "bees",
    "owls",
    "bears",
    "wolves",
    "deer",
    "hens",
    "pigs",
    "swans",
    "crows",
    "snails",
    "moths",
    "donkeys",
    "squirrels",
    "beavers",
    "badgers",
    "storks",
    "lambs",
    "toads",
    "seals",
];

/// Moods.
pub(super) const MOODS: [&str; 20] = [
    "happy", "tired", "hungry", "sad", "angry", "afraid", "proud", "cold", "curious", "bored",
    "thirsty", "lonely", "calm", "busy", "late", "sorry", "lucky", "sick", "brave", "shy",
];

/// Adjectives.
pub(super) const LOOKS: [&str; 24] = [
    "small", "old", "big", "new", "quiet", "bright", "dark", "strange", "pretty", "heavy", "round",
    "soft", "tall", "thin", "wild", "gentle", "clever", "slow", "quick", "funny", "dusty", "shiny",
    "crooked", "noble",
];
