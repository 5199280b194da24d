"""Words that give a language away. Arabic is spelled as `resolve.plain` leaves it: bare alef, yeh and heh, no marks."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that build an English sentence and are rare in other languages written in Latin letters.
ENGLISH_FRAME = _words("""
i i'm i've i'd i'll im ive my mine myself you you're your yours she she's his him it it's its we we're our they they're
their them there there's is isn't are aren't were been being be have haven't having had did didn't does doesn't don't
dont what what's which who whose when where why how how's this that that's these those the if because should shouldn't
would could couldn't can can't cannot will won't must might shall may about after before since until during while from
into any some every each another much many more than then very too just only also still always never not when's
does needs want wants need get got feel feels feeling felt says said told think know
""")
# Words that glue noun phrases or are words of other languages as well: they count, but do not decide alone.
ENGLISH_GLUE = _words("""
a an and or of in on at to for with without by as am was do so no me he her has all out up down off over under between
but again once both here go due per vs
""")
# Words that open an English question or instruction, whatever terms follow.
ENGLISH_OPENERS = _words("""
is are am was were do does did can could should would will what whats what's how why when where who which whose has have
may might explain define describe
""")
# Words that build sentences in the other languages of Latin script that patients write most, none of them English.
FOREIGN_FRAME = (
    _words("""
je j'ai est une les des dans pour avec que qui mon ma mes tu il elle nous vous c'est du au aux le la et ne pas sur très
el los las es en mi tengo y muy por para con pero del qué estoy duele se un soy hace
ich ist und nicht der das den dem ein eine einen mein meine mir mich wie kann mit auf zu für auch seit habe sich wir
io sono è il della che mio mia per gli ho mi non ma di fa anche da
eu não estou com minha meu uma o os tenho dor na em é muito são
ik een het de niet mijn heb en van dit dat wat voor te met hoe
ve bir bu için çok var benim ne nasıl mı değil ile gibi daha
saya yang dan tidak untuk apa ini itu dengan sakit bagaimana bisa sudah ada dari di
""")
    - ENGLISH_FRAME
    - ENGLISH_GLUE
)
# What patients write about. A short phrase of these alone is a term, and a term keeps the conversation's language.
ENGLISH_COMMON = _words("""
pain painful ache aches aching headache headaches fever cough coughing cold flu nausea vomiting vomit dizzy dizziness
tired fatigue weak weakness swelling swollen rash itchy itching bleeding blood bloody stool urine burning sore throat
chest stomach back leg arm hand foot feet head neck eye eyes ear ears knee skin heart lung liver kidney severe mild low
high grade blurred vision cramps cramp abdominal left right side recent travel day days week weeks month months year
years old morning night today yesterday last daily twice doctor hospital clinic pharmacy medicine medication medications
tablet tablets pill pills dose take taking taken eat eating drink drinking sleep sleeping safe dangerous normal bad good
better worse help treat treatment cause causes symptom symptoms side effects effect test tests result results pregnant
pregnancy baby child children son daughter mother father wife husband woman man patient male female explain describe
tell give please suggest recommend use used using avoid stop start started keep make makes hurt hurts mean means happen
happens same time long often food water diet weight loss gain shortness breath difficulty breathing
""")
# Small talk that says nothing about the language: a message of these alone keeps the conversation's.
ACKNOWLEDGEMENTS = _words("""
ok okay okey k kk yes yeah yep yup no nope nah sure fine right correct exactly thanks thank thx ty you so very much
a lot many please pls hi hello hey dear doctor dr doc bye goodbye great good perfect cool nice hmm hm mm mhm ah oh uh
um alright got it welcome sorry wow lol morning evening there and sir madam again well
""")

# Arabic written in Latin letters, words without a digit in them. None is an English word.
ARABIZI = _words("""
ana enta enti inta inti ente howa heya huwa hiya e7na ihna entu shu sho shou shoo chou eh eih leh leish lesh laysh keef
kif kifak kifik keif wein wayn feen fein emta wesh shlon shlonak ayesh shinu shnu mish mesh msh moush mafi mafish
mafeesh walla wallah wallahi inshallah inshalla enshallah insha'allah alhamdulillah hamdulillah yalla habibi habibti
shukran shokran marhaba salam salamu alaykum ahlan sabah masa kteer ktir kteir kathir awi gedan jiddan bas lazem lazim
momken mumkin mumken ayez ayz aayez 3ayez badi baddi biddi bidi abgha abghi areed uriid andi indi fih kaman lissa lessa
ya3ni yaani yani kol kul kulli aw iza itha eza lamma lama ba2a dah elly elli illi ili haydi hayda hada hadi hatha hadha
kan kanet kunt akhod akhud akhed akol ashrab anam anaam mareed marid mareeda tabib daktor doktor dawa dawaa wajaa waja
alam batni batn rasi dahri zahri albi qalbi sadri haraba harara sokhoneya taaban taban taabana tefl tefel ibni binti
omri sana yom youm ayam shahr usbu3 bokra bukra bzaf bezzaf labas dyali wach kayn chno kifach bghit daba mzyan imbarih
embareh fel bel bil lel
""")

# Words that build an Arabic sentence, in Modern Standard Arabic and in the dialects.
ARABIC_FRAME = _words("""
انا انت انتي انتم هو هي هم نحن احنا هل ما ماذا ماهو ماهي متي اين وين فين كيف كم لماذا ليش ليه شو ايش وش شنو
اش علاش واش فاش كيفاش قداش شلون ايه اللي الذي التي الذين هذا هذه هاد هاي هذي ده دي دا تلك ذلك في من الي علي عن مع بعد
قبل بين منذ عند عندي عندك عنده عندها لدي لديه لديها لي له لها كان كانت يكون اكون ان اني انه انها لكن بس او ثم اذا لو لا
لم لن ليس مش مو ماكو اكو مافي فيه فيها كل بعض جدا كتير كثير وايد بزاف اوي شوي قليلا يعني ممكن لازم يجب يمكن يمكنني
هناك حتي لان عشان علشان مشان يا بدي ابغي ابي عايز عاوز اريد احس اشعر اعاني بيوجعني يوجعني تؤلمني وانا ولا وهل وما
ومن وعندي واني وكيف وعنده وعندها بتاعتي بتاعي ديالي نقدر اقدر ينفع اعمل افعل اسوي ندير منو شكرا نعم ايوه
""")

# Persian and Urdu in their own spelling. Words that Arabic writes the same way are left out.
PERSIAN_OR_URDU = _words("""
است هست هستم هستند نیست دارم دارد داری دارید دارند ندارم را که برای چه چیست چرا چطور چگونه آیا می شود نمی کنم کند کنید
کردم کرده خیلی باید درد سردرد دلم شما این هایی چند بچه دارو داروی گلو اگر ولی کار بی تواند توانم میکنه میکنم
ہے ہیں ہوں ہو میں میرے میرا میری مجھے مجھ کو کا کی کے نے سے اور یہ وہ کیا کیسے کیوں نہیں بہت آپ تھا تھی رہا رہی رہے
بخار کھانسی پیٹ گلے کروں کرنا چاہیے لیے
""")
