"""What the demo model knows: short paragraphs about water, power and queues, and small tables of facts."""

SUBJECTS: dict[str, str] = {
    "a penstock": "A penstock is a pipe with a gate that carries water from a dam down to a turbine. The gate can open and close while the turbine runs. It holds back the head of water and keeps the pressure steady. Without it, the turbine would get too much water or none.",
    "a dam": "A dam is a wall across a river that holds back water. The lake behind it is called a reservoir. Dams store water for dry months and turn its fall into power. A spillway lets the extra water pass when the rain is heavy.",
    "a river": "A river is a stream of fresh water that flows downhill to a lake or to the sea. It begins at a spring, a glacier or a lake in the hills. Smaller streams join it on the way and make it wide. Over many years it carves a valley into the rock.",
    "a turbine": "A turbine is a wheel with blades that turns when water, wind or steam pushes it. Its shaft drives a generator, and the generator makes electric power. The faster the flow, the more power it gives. Good turbines turn nine tenths of the water's energy into power.",
    "a generator": "A generator is a machine that turns motion into electric power. Inside it, a magnet spins past coils of copper wire. The moving magnet pushes a current through the wire. Most of the world's power is made this way.",
    "a reservoir": "A reservoir is a lake made by people to store water. It fills in the wet season and is drawn down in the dry season. Towns drink from it, farms are watered by it, and turbines are driven by it. Its level is measured every day.",
    "a spillway": "A spillway is the path by which extra water leaves a reservoir. It protects the dam, because water that runs over the top could break the wall. Its gates open before a flood arrives. At the bottom, blocks of concrete slow the water down.",
    "a lock": "A lock is a chamber with two gates that lifts boats from one level of water to another. The boat enters, the gate closes behind it, and water flows in or out. When the levels are equal, the other gate opens. No pump is needed, because the water runs by its own weight.",
    "a canal": "A canal is a river made by people. It carries boats, or brings water to fields. Where the land rises, locks lift the boats step by step. Long ago, horses pulled the boats along the bank.",
    "a waterfall": "A waterfall is a place where a river drops over a step of rock. The rock at the top is hard, and the rock below it is soft. The falling water slowly cuts the soft rock away. That is why waterfalls move upstream over thousands of years.",
    "a lake": "A lake is a large body of still water with land all around it. Rivers bring water in, and most lakes have one river that leads it out. In summer the warm water stays on top. Fish, birds and people live on its shore.",
    "a glacier": "A glacier is a river of ice that moves very slowly. It forms where more snow falls in winter than melts in summer. Its weight grinds the rock below to fine dust. When it melts, it feeds rivers through the dry months.",
    "a spring": "A spring is a place where water comes out of the ground. Rain sinks into the soil and travels through the rock. Where the rock cannot hold it, the water rises to the light. Spring water is clear and cold.",
    "the sea": "The sea is the great body of salt water that covers most of the earth. Rivers bring it water and a little salt. The sun lifts water from it into the sky, and the salt stays behind. The moon pulls on it and makes the tides.",
    "rain": "Rain is water that falls from clouds in drops. The sun warms the sea, and vapour rises into the sky. High in the cold air the vapour turns into drops. When the drops are heavy enough, they fall.",
    "a cloud": "A cloud is made of tiny drops of water or crystals of ice. The drops are so small that the air holds them up. When they meet, they grow. A dark cloud is thick, and it often brings rain.",
    "a flood": "A flood is water where land should be dry. It comes when rain is heavy or snow melts fast. Dams and walls hold some of it back. A meadow beside the river gives the water room and slows it down.",
    "the tide": "The tide is the slow rise and fall of the sea. The moon pulls the water towards itself. Most coasts see two high tides and two low tides every day. Sailors read the tide before they leave the harbour.",
    "ice": "Ice is frozen water. It is lighter than water, so it floats. Because it floats, lakes freeze from the top, and the fish below survive the winter. It melts when the air is warmer than zero degrees.",
    "steam": "Steam is water that has become a gas. Water boils at one hundred degrees at the level of the sea. Steam needs much more room than water, and so it can push a piston or a turbine. A cloud above a kettle is steam that has cooled into drops.",
    "a valve": "A valve is a part that opens or closes a pipe. A small turn of the wheel changes the flow a little. Some valves let water through in one direction only. When a pipe bursts, the valve above it is closed first.",
    "a pump": "A pump is a machine that moves water uphill or through a pipe. It needs power to do its work. At night, when power is cheap, some dams pump water back up. By day, the same water makes power again.",
    "a bridge": "A bridge carries a road across a river or a valley. An arch of stone pushes its weight into the banks. A long bridge hangs from cables of steel. Engineers check every bridge for cracks.",
    "a mill": "A mill is a house with a wheel that is turned by a stream. The wheel drives a heavy stone, and the stone grinds grain into flour. A small gate lets the miller choose how much water reaches the wheel. Mills were the first machines that did not get tired.",
    "the water cycle": "The water cycle is the way of water from the sea to the sky and back. The sun lifts it, the wind carries it, and the cold lets it fall. Rivers bring it home. No drop is ever lost.",
    "electricity": "Electricity is the flow of tiny charges through a wire. It is made by generators and carried by lines on tall towers. It must be used at the moment it is made, or stored in a battery or in a lake. It gives us light, heat and motion.",
    "pressure": "Pressure is how hard water pushes on the wall around it. The deeper you go, the higher it is. Ten metres of water push as hard as all the air above us. That is why a dam is thick at the bottom.",
    "flow": "Flow is how much water passes a point in a second. It is the area of the pipe times the speed of the water. A narrow pipe makes the water run faster. Engineers measure it in cubic metres per second.",
    "a queue": "A queue is a line in which requests wait for their turn. The one who came first is served first, unless a policy says otherwise. A queue grows when work arrives faster than it is done. A good queue is short, fair and easy to see.",
    "a batch": "A batch is a group of requests that run together. Running them together costs little more than running one. New requests may join at any step, and finished ones leave. That keeps the machine busy and the waiting short.",
    "a policy": "A policy is a rule that says who goes next. One policy serves the oldest request, and another serves the most urgent. A fair policy gives every tenant its share. The operator can change it while the work goes on.",
    "a tenant": "A tenant is a team that shares the machine with others. Each tenant has a key, a share and limits. If one tenant sends too much, the others should not suffer. That is what a fair queue is for.",
    "a token": "A token is a small piece of text, often a word or a part of a word. A language model reads tokens and writes one token at a time. Longer answers need more tokens, and so more time. Limits are counted in tokens, because tokens are what the work costs.",
    "backpressure": "Backpressure is how a busy system says that it is full. It refuses the least urgent work first. It tells the sender when to try again. A system without it slows down for everyone.",
    "a deadline": "A deadline is the moment by which an answer is needed. Work with an early deadline should go first. Work that is already too late should not delay the rest. A deadline without a plan is only a wish.",
    "a language model": "A language model is a program that has read text and guesses the next word. It writes one token after another. A small model knows little, but it answers fast. I am a very small one.",
    "a graphics card": "A graphics card is a chip that does many simple sums at the same time. Models run on it, because they are made of such sums. It works best when many requests share one step. Its memory holds the model and what each request has said so far.",
    "a cache": "A cache is a small store that keeps what will be needed again soon. Reading from it is fast. When it is full, something old must leave. A model keeps the words it has read in a cache, so that it need not read them twice.",
    "a boat": "A boat is a small ship that floats because it pushes water aside. Oars, sails or a motor move it. On a canal it waits at the lock for its turn. A good boat is light and dry inside.",
    "a fish": "A fish is an animal that lives in water and breathes with gills. It swims by moving its tail. Salmon climb rivers to the place where they were born. At a dam they use a ladder of small pools.",
    "a well": "A well is a deep hole that reaches the water in the ground. A bucket or a pump lifts the water up. In a dry year its level falls. A village is often built around its well.",
    "snow": "Snow is made of crystals of ice that fall from cold clouds. Every crystal has six arms. In the hills it stores water until spring. When it melts, the rivers rise.",
}

WHY: dict[str, str] = {
    "is the sky blue": "The sky is blue because the air scatters blue light more than red light.",
    "is the sea salty": "The sea is salty because rivers bring salt from the rocks, and the salt stays when the water rises into the sky.",
    "do rivers bend": "Rivers bend because the water runs faster on the outside of a curve and cuts the bank away there.",
    "does ice float": "Ice floats because it is lighter than the water around it.",
    "are dams thick at the bottom": "Dams are thick at the bottom because the pressure of the water is highest there.",
    "do queues grow": "Queues grow because work arrives faster than it is done.",
    "do we use batches": "We use batches because running many requests together costs little more than running one.",
    "do we need a gate": "We need a gate because the flow must be stopped and started while the turbine runs.",
    "does it rain": "It rains because drops in the clouds grow until the air can hold them no longer.",
    "do boats float": "Boats float because they push aside as much water as they weigh.",
    "does the tide rise": "The tide rises because the moon pulls the water of the sea towards itself.",
    "is a fair queue good": "A fair queue is good because one busy tenant cannot take the share of the others.",
    "do leaves fall": "Leaves fall because the tree saves water in the cold months.",
    "do we sleep": "We sleep because the body and the mind need time to repair themselves.",
}

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Sweden": "Stockholm",
    "Austria": "Vienna", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa", "Brazil": "Brasilia", "Greece": "Athens", "Poland": "Warsaw",
    "Portugal": "Lisbon", "England": "London",
}  # fmt: skip

OPPOSITES: dict[str, str] = {
    "hot": "cold", "big": "small", "fast": "slow", "open": "closed", "full": "empty", "high": "low", "wet": "dry",
    "light": "dark", "early": "late", "deep": "shallow", "wide": "narrow", "old": "new", "near": "far", "up": "down",
}  # fmt: skip

COLOURS: dict[str, str] = {
    "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a lemon": "yellow", "blood": "red",
    "coal": "black", "a leaf in summer": "green", "an orange": "orange", "the sea": "blue",
}  # fmt: skip

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip

SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hi", "Hi there", "Hello there", "Hey", "Good day", "Good morning", "Good evening", "Hello!", "Hi!"),
        (
            "Hello! How can I help you today?",
            "Hello! Ask me about rivers, dams, turbines or queues.",
            "Hi there! What would you like to know?",
            "Good to see you! Shall I tell you a story, or explain how a dam works?",
        ),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a person?",
            "Introduce yourself.",
        ),
        (
            "I am the demo model of Penstock, a very small language model. I know a little about water, power and queues.",
            "I am a very small language model that was trained on your machine in less than a minute. I know about rivers, dams and queues.",
        ),
    ),
    (
        ("How are you?", "How are you today?", "How do you do?", "Is everything all right?"),
        ("I am well, thank you. How can I help you?", "Very well, thank you! The queue is short today."),
    ),
    (
        (
            "What can you do?",
            "What do you know?",
            "What can I ask you?",
            "Help",
            "Can you help me?",
            "What should I ask?",
        ),
        (
            "You can ask me what a dam is, how a turbine works or why rivers bend. I can also tell you a short story.",
            "I can explain rivers, dams, turbines and queues, add small numbers, and tell you a story.",
        ),
    ),
    (
        ("Thank you", "Thanks", "Thank you very much", "Thanks a lot!", "Great, thanks", "That was helpful."),
        ("You are welcome!", "You are welcome! Ask me anything else about water or queues.", "It was my pleasure."),
    ),
    (
        ("Goodbye", "Bye", "See you later", "Good night", "Bye!"),
        ("Goodbye! Come back soon.", "See you later! May your queue be short."),
    ),
    (
        ("Say hello.", "Say hello to the operator.", "Say hi", "Please say hello", "Greet me"),
        ("Hello!", "Hello! It is good to see you."),
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh", "Say something funny."),
        (
            "Why did the river go to school? It wanted to be a little deeper.",
            "Why was the queue so calm? Because everyone knew when it was their turn.",
            "Why do dams make good friends? They never let you down all at once.",
        ),
    ),
)
