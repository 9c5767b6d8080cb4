"""Which cut-outs of tuxpaint-stamps-default are photographs of one thing, and what it is called here.

The names are our own. Left out are drawings, letters, several things in one cut-out, what cannot be counted, and what
a person would not name from the picture.
"""

from __future__ import annotations

import functools
from pathlib import Path

from miniature.texts import Kind

TABLE = """
animals/amphibians
  frog: frog frog-1
animals/birds
  duck: duck drake
  goose/geese: gander
  chicken: chicken_profile hen rooster
  guinea fowl/guinea fowl: guineafowl helmeted_guineafowl
  penguin: penguin little-penguin magellanic_penguin
  parrot: adelaide-rosella rainbow-lorikeet
  gull: seagull silver-gull
  heron: heron_greatblue heron_greatblue_flying
  crane: crowned_crane
  peacock: peacock
  pelican: pelican
  pigeon: pigeon
  flamingo: pink_flamingo
  owl: owl
  ostrich/ostriches: ostrich
  toucan: tucan
  turkey: turkey
  vulture: vulture
  crow: crow
  blackbird: blackbird
  magpie: magpie
animals/fish
  fish/fish: bluegroper butterflyfish clownfish coraltrout dolphinfish moonwrasse stripedfish lionfish
  seahorse: seahorse
  lobster: lobster
  shrimp: shrimp
animals/insects
  slug: Brown_slug
  woodlouse/woodlice: Woodlouse
  bee: bee
  fly/flies: fly hoverfly
  grasshopper: grasshopper
  wasp: hornet
  mantis/mantises: mantis
  moth: xanthia
animals/lizards
  iguana: iguana
animals/mammals/apes
  chimpanzee: chimp
  gorilla: gorilla
animals/mammals/aquatic
  dolphin: dolphin
  orca: orca
  otter: otter
  sea lion: sea_lion
  whale: whale
animals/mammals
  badger: badger
  echidna: echidna
  elephant: elephant
  ferret: ferret
  giraffe: giraffe
  hippopotamus/hippopotamuses: hippopotamus
  pig: pig pig_golden pig_golden2
  rabbit: rabbit_little
  rhinoceros/rhinoceroses: rhino_black
animals/mammals/bears
  bear: bear european-bear
animals/mammals/bears/toys
  teddy bear: edward_bear
animals/mammals/bovines
  bison/bison: bison
  cow: cow cow_white bull zebu
  gnu: gnu-baby-stand gnu-baby gnu-sitting gnu-stand
  goat: goat mountaingoat
  antelope: indian_blackbuck
  sheep/sheep: ram sheep sheep_lamb
  yak: yak
animals/mammals/camel
  camel: camel dromedary
animals/mammals/cats
  lion: lion lion-2
  tiger: tiger tiger_sumatran
animals/mammals/deer
  deer/deer: caribou deer doe wapiti
animals/mammals/dogs
  dog: dog dingo
  fox/foxes: fox
animals/mammals/equines
  donkey: donkey donkey_eating
  horse: horse
  zebra: zebra
animals/mammals/rodents
  beaver: beaver
  capybara: capybara
  marmot: marmot
  mouse/mice: mouse
  rabbit: rabbit rabbit-2
  rat: rat
  squirrel: squirrel
animals/marsupials
  kangaroo: kangaroo
  koala: koala
  wombat: wombat
animals/shellfish
  shell: abalone murray-mussel
clothes
  clothespin: clothespin_new clothespin_old
clothes/hats
  top hat: tophat
food/fruit
  apricot: apricot Apricot_whole
  strawberry/strawberries: strawberry Strawberry2
  apple: apple_fuji apple_granny_smith apple_green apple_red apple_sierra_beauty
  avocado: avocado
  banana: banana
  kiwi: kiwi
  lemon: lemon
  orange: orange mandarine
  mango/mangoes: mango
  pear: pear
  pineapple: pineapple
  pomegranate: pomegranate
  raspberry/raspberries: raspberry
food/nuts
  almond: almond
  pecan: pecan
  walnut: walnut walnut_shelled
food/vegetables
  carrot: carrot
  chili/chilies: chilepepper
  eggplant: eggplant
  mushroom: mushroom
  onion: onion
  pepper: pepper yellowpepper
  potato/potatoes: potato
  pumpkin: pumpkin_small
  tomato/tomatoes: tomato
  yam: yam
hobbies
  camera: camera_35mm
hobbies/music/brass
  trumpet: trumpet
hobbies/music/percussion
  drum: drum_tomtom_floor
hobbies/music/string
  cello: cello
  guitar: guitar2 guitar_classical guitar_electric guitar_electric_bass
  violin: violin
hobbies/music/wind
  bassoon: bassoon
household
  light bulb: Lightbulb
  trash can: garbagecan wheelie_bin
  kettle: kettle
  key: key
  rubber duck: rubberduck
  toilet: toilet
household/arttools
  pen: highlighter pen_dryerase
  pair of scissors/pairs of scissors: scissors_small_closed scissors_small_open
household/dishes
  cup: mug
  jug: pitcher_small
  teapot: teapot
household/dishes/utensils
  pepper mill: pepper_grinder
household/tools
  cement mixer: cementmixer
  hammer: hammer mallet_metal
  tape measure: measuring_tape
  paintbrush/paintbrushes: paintbrush_large
  pair of pliers/pairs of pliers: plyers
  saw: saw
  shovel: spade
  toolbox/toolboxes: toolbox
  wrench/wrenches: wrench wrench_adjustable wrench_plumbers
medical
  bandage: bandage_adhesive
  thermometer: mercurythermometer
  stethoscope: stethoscope
  syringe: syringe
military/vehicles
  tank: bradley infantry-stryker ww2_german_gun
  airplane: f22_raptor
people
  firefighter: fireman200b
plants/flowers
  flower: adeenia anemone_red bolsom chemparathi daffodil flower1 flower10 flower2 flower3 flower5 flower6
  flower: flower8 flower9 iris marigold pigface red-gazania rose whitestar-petunia yellow-flower
plants/mushrooms
  mushroom: cep cep-1
plants/trees
  tree: birch holm_oak liberia-palm tree336
  pine cone: pinecone
seasonal
  candle: candle
seasonal/christmas
  candy cane: Candy_cane_photo_1 Candy_cane_photo_2
  Christmas tree: Christmas_Tree_photo
  pie: Mince_Pie
  wreath: xmaswreath
seasonal/halloween
  gravestone: grave-a grave-b grave-d grave-e grave-g grave-h grave-i grave-j
sports
  football: football australian_rules_football
  basketball: basketball
  cricket ball: cricketball
  soccer ball: soccer
  tennis ball: tennis_ball
  tennis racket: tennis_racket
  trophy/trophies: trophy_cup
town
  mailbox/mailboxes: uk_post_box usps_mailbox
vehicles
  wheel: 7spoke256 wheel_tractor
  truck: garbagetruck
vehicles/auto
  car: beetle sedan sportscar2
  truck: truck
vehicles/cycle
  tricycle: pink_tricycle
vehicles/emergency
  fire truck: firetruck
vehicles/flight
  balloon: balloon360
vehicles/flight/planes
  airplane: 747
vehicles/masstransit
  bus/buses: green_korean_bus
vehicles/race
  race car: indycar
vehicles/ship
  sailboat: chineseJunk walnutBoat
"""
HELD_OUT_FROM, HELD_OUT_SHARE = 3, 4
"""Of a kind with so many cut-outs or more, the last of every four (at least one) are for the test alone."""


@functools.cache
def stamps() -> dict[str, list[Path]]:
    """The cut-outs of each kind, by its name; paths within the package's folder of stamps."""
    found: dict[str, list[Path]] = {}
    folder = Path()
    for line in TABLE.strip().splitlines():
        if not line.startswith(" "):
            folder = Path(line)
            continue
        names, _, files = line.strip().partition(": ")
        found.setdefault(names.partition("/")[0].lower(), []).extend(folder / f"{name}.png" for name in files.split())
    return found


@functools.cache
def kinds() -> dict[str, Kind]:
    """Singular and plural of each kind, by its name."""
    names = [line.strip().partition(": ")[0].lower().partition("/") for line in TABLE.splitlines() if ": " in line]
    return {singular: Kind(singular, plural or f"{singular}s") for singular, _, plural in names}


@functools.cache
def held_out() -> dict[str, list[Path]]:
    """The cut-outs that no training shows, of the kinds that have some."""
    return {
        kind: files[-max(1, len(files) // HELD_OUT_SHARE) :]
        for kind, files in stamps().items()
        if len(files) >= HELD_OUT_FROM
    }
